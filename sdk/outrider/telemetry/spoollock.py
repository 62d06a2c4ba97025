"""The file beside a spool: which process has it, and which numbers it has given.

The numbers are in the database too, but a journal of which the end is gone is for SQLite a shorter one, and nothing in
it says that there was more. Numbers that are given twice make new records look like duplicates of others.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Final, NamedTuple

from outrider_runtimes.errors import TelemetryError

_HOLDER_BYTES: Final = 32
_STREAM_BYTES: Final = 36  # of a UUID's text
_NUMBER_BYTES: Final = 20  # of the largest that SQLite holds, with room for a sign


class Given(NamedTuple):
    """What was noted last: in ``stream``, all numbers below ``next_seq`` were given or skipped."""

    stream: str
    next_seq: int


class SpoolLock:
    """The lock, from its making on. Not over a fork: a child may only ``close`` it."""

    def __init__(self, path: Path) -> None:
        """Lock the spool at ``path``; its folder is made where it is missing.

        Raises:
            TelemetryError: another process has it, or the folder cannot be written.
        """
        import fcntl

        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = io.FileIO(os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666), "r+")
        except OSError as error:
            raise TelemetryError(
                f"the spool's folder {path.parent} cannot be written: {error}",
                hint="name one that can be written by state=",
            ) from error
        self._stream = ""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._file.fileno(), _HOLDER_BYTES, 0).decode("ascii", "replace").strip() or "unknown"
            self.close()
            raise TelemetryError(
                f"the spool {path} is in use by process {pid}",
                hint="give each process a device id or a state directory of its own",
            ) from None
        self._write((b"%d" % os.getpid()).ljust(_HOLDER_BYTES - 1) + b"\n", 0)

    @property
    def closed(self) -> bool:
        """Whether it was let go of."""
        return self._file.closed

    @property
    def given(self) -> Given | None:
        """What was noted last, by whoever had the lock; None where nothing that can be read was."""
        try:
            text = os.pread(self._file.fileno(), _STREAM_BYTES + _NUMBER_BYTES, _HOLDER_BYTES).decode(
                "ascii", "replace"
            )
        except OSError:  # the spool itself may be sound
            return None
        stream, number = text[:_STREAM_BYTES], text[_STREAM_BYTES:]
        if len(number) != _NUMBER_BYTES or not (number.isascii() and number.isdecimal()):
            return None
        return Given(stream, int(number))

    def note(self, stream: str, next_seq: int) -> None:
        """After the commit that gave them: a power cut then leaves a note of fewer numbers than the journal, never of
        more. It is not synced, and on a disk without room it stays as it was.
        """
        number = b"%020d" % next_seq
        if stream == self._stream:
            self._write(number, _HOLDER_BYTES + _STREAM_BYTES)
        else:
            self._write(stream.encode().ljust(_STREAM_BYTES)[:_STREAM_BYTES] + number + b"\n", _HOLDER_BYTES)
            self._stream = stream

    def close(self) -> None:
        """Let go of it. A second call does nothing."""
        self._file.close()

    def _write(self, text: bytes, at: int) -> None:
        try:
            os.pwrite(self._file.fileno(), text, at)
        except OSError:  # of no use to a caller whose record is committed
            return
