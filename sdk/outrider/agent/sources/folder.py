"""Files that come into a folder: each is answered once, over restarts too."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Final, NamedTuple

from outrider.agent.payload import MAX_INPUT_BYTES, Payload, Signal, Windows, read_payload
from outrider.agent.sound import read_wave
from outrider.agent.sourceconfig import FolderConfig
from outrider.agent.sources.base import TICK_S, Frame, Sleep, known, unreadable
from outrider.bundle.files import atomic_file
from outrider.store.state import NO_SPACE, system_errors
from outrider_runtimes.errors import InputError, SourceError

log = logging.getLogger(__name__)

# Of files that are gone the newest so many are remembered: a folder that was not mounted for a moment is not all new.
MAX_GONE: Final = 10_000
# A file at which the process has died so often is left out: what is behind it would never be answered.
MOST_DEATHS: Final = 2


class Stamp(NamedTuple):
    """A file as it was seen: one that has changed since is another one."""

    modified_ns: int
    name: str
    size_bytes: int


class Done:
    """Which files have been dealt with, in a file of lines.

    A line is written, not synced, for each of them: after a kill -9 none is done twice but the one under way; after a
    power cut those of the last seconds may be. On a full disk it is kept in memory until there is room.
    """

    def __init__(self, path: Path, present: Callable[[], list[Stamp]]) -> None:
        """Read it and forget what is long gone. Raises StoreError, StateDirectoryError, and what ``present`` does."""
        self._path = path
        self._stamps = _kept(set(_stamps(path)), present())
        with system_errors(path.parent):
            self._write_anew()
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def keep(self, present: Collection[Stamp]) -> None:
        """Forget what is long gone from the folder, once it is much. Raises StoreError, StateDirectoryError."""
        if len(self._stamps) <= len(present) + 2 * MAX_GONE:
            return
        self._stamps = _kept(self._stamps, present)
        with system_errors(self._path.parent):
            self._write_anew()
            before, self._file = self._file, self._path.open("a", encoding="utf-8")
            with _without_room():
                before.close()

    def _write_anew(self) -> None:
        with _without_room(), atomic_file(self._path, mode=0o600) as file:
            file.write("".join(map(_line, sorted(self._stamps))).encode())

    def __contains__(self, stamp: Stamp) -> bool:
        return stamp in self._stamps

    def add(self, stamp: Stamp) -> None:
        """It has been dealt with. Raises StoreError, StateDirectoryError."""
        self._stamps.add(stamp)
        with system_errors(self._path.parent), _without_room():
            self._file.write(_line(stamp))
            self._file.flush()  # what finds no room stays in the buffer for the next one

    def close(self) -> None:
        """Sync and close."""
        with system_errors(self._path.parent), _without_room():
            os.fsync(self._file.fileno())
            self._file.close()


class UnderWay:
    """Which file is being dealt with, in a file that a clean end removes: at what is there, a process died.

    On a full disk nothing is known of it.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises StateDirectoryError, StoreError."""
        self._path = path
        self._descriptor: int | None = None
        self._died_at: Stamp | None = None
        self._before = 0
        with system_errors(path.parent), _without_room():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(ValueError, TypeError):  # nothing, or a line that was cut
                *stamp, before = json.loads(os.pread(self._descriptor, 4096, 0).partition(b"\n")[0])
                self._died_at, self._before = Stamp(*stamp), int(before) + 1

    def deaths(self, stamp: Stamp) -> int:
        """How often in a row the process died while it was dealt with."""
        return self._before if stamp == self._died_at else 0

    def begin(self, stamp: Stamp) -> None:
        """It is dealt with from now on. Written, not synced. Raises StateDirectoryError, StoreError."""
        if self._descriptor is None:
            return
        line = json.dumps([*stamp, self.deaths(stamp)]).encode() + b"\n"
        with system_errors(self._path.parent), _without_room():
            os.pwrite(self._descriptor, line, 0)

    def close(self) -> None:
        """A clean end: nothing is under way."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self._path.unlink()


def _kept(stamps: set[Stamp], present: Collection[Stamp]) -> set[Stamp]:
    """What is there, and of what is gone the newest."""
    return stamps & set(present) | set(sorted(stamps - set(present))[-MAX_GONE:])


@contextlib.contextmanager
def _without_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        log.debug("what is done is not written down: %s", error)


class FolderSource:
    """The files of a folder, the oldest first. One that is being written is left until it is whole."""

    def __init__(
        self,
        config: FolderConfig,
        memory: Path,
        *,
        sleep: Sleep = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``memory``: the file that keeps what is done."""
        self._config = config
        self._memory = memory
        self._sleep = sleep
        self._clock = clock

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        done = Done(self._memory, self._files)
        under_way = UnderWay(self._memory.with_suffix(".begun"))
        unchanged_since: dict[Stamp, float] = {}
        try:
            while True:
                files = self._files()
                done.keep(files)
                waiting = [stamp for stamp in files if stamp not in done]
                now = self._clock()
                unchanged_since = {stamp: unchanged_since.get(stamp, now) for stamp in waiting}
                whole = [stamp for stamp in waiting if now - unchanged_since[stamp] >= self._config.settle_s]
                for stamp in whole:
                    if _stamp_of(self._config.path / stamp.name) == stamp:  # others came first, and it may have changed
                        under_way.begin(stamp)
                        yield from self._of(stamp, done, deaths=under_way.deaths(stamp))
                if self._config.once and not waiting:
                    return
                if not whole:
                    yield from self._rest()
        finally:
            under_way.close()
            done.close()

    def _rest(self) -> Iterator[None]:
        until = self._clock() + self._config.poll_s
        while (left_s := until - self._clock()) > 0:
            yield None
            self._sleep(min(left_s, TICK_S))

    def _files(self) -> list[Stamp]:
        try:
            with os.scandir(self._config.path) as entries:
                found = [_stamp_of(entry) for entry in entries if self._counts(entry)]
        except OSError as error:
            raise SourceError(
                f"folder {self._config.path} cannot be read: {error.strerror}", hint="make it, or correct source.path"
            ) from None
        return sorted(stamp for stamp in found if stamp is not None)

    def _counts(self, entry: os.DirEntry[str]) -> bool:
        hidden = entry.name.startswith(".")
        return not hidden and Path(entry.name).suffix.lower() in self._config.suffixes

    def _of(self, stamp: Stamp, done: Done, *, deaths: int) -> Iterator[Frame]:
        """The frames of one file; the last of them marks it as done."""
        if deaths >= MOST_DEATHS:
            why = InputError(f"the agent died {deaths} times while it was under way; it is left out")
            yield Frame(name=stamp.name, read=unreadable(why), done=partial(done.add, stamp))
            return
        path = self._config.path / stamp.name
        reads = self._windows(path) if self._is_windowed(path) else iter([partial(self._read, path)])
        last = next(reads)
        for read in reads:
            yield Frame(name=stamp.name, read=last)
            last = read
        yield Frame(name=stamp.name, read=last, done=partial(done.add, stamp))

    def _is_windowed(self, path: Path) -> bool:
        return path.suffix.lower() == ".wav" and self._config.window is not None

    def _windows(self, path: Path) -> Iterator[Callable[[], Payload]]:
        """One after the other: together they may be many times the file. At least one that says why there is none."""
        assert self._config.window is not None
        try:
            samples = read_wave(_bytes_of(path), rate_hz=self._config.rate_hz)
            if len(samples) < self._config.window:
                raise InputError(f"{len(samples)} samples are less than one window of {self._config.window}")
        except InputError as error:
            yield unreadable(error)
            return
        for window in Windows(self._config.window, self._config.hop).add(samples):
            yield known(Signal(array=window, axes="T"))

    def _read(self, path: Path) -> Payload:
        raw, kind = _bytes_of(path), path.suffix.lower()
        if kind == ".wav":
            return Signal(array=read_wave(raw, rate_hz=self._config.rate_hz), axes="T")
        return read_payload(raw, kind, colour=self._config.colour)


def _bytes_of(path: Path) -> bytes:
    try:
        # Not to wait for who writes, should it have become a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path.name} is no file any more")
            return file.read(min(status.st_size, MAX_INPUT_BYTES) + 1)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}") from None


def _stamp_of(path: Path | os.DirEntry[str]) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:  # it went away
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Stamp(modified_ns=status.st_mtime_ns, name=path.name, size_bytes=status.st_size)


def _stamps(path: Path) -> Iterator[Stamp]:
    """What a memory's lines say; a line that was cut when the power went says nothing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            modified_ns, name, size_bytes = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and isinstance(modified_ns, int) and isinstance(size_bytes, int):
            yield Stamp(modified_ns, name, size_bytes)


def _line(stamp: Stamp) -> str:
    return json.dumps(stamp) + "\n"
