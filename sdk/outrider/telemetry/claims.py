"""Rows on their way out of a spool: read over a connection of their own, so that no reader waits for a disk's sync."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final
from zlib import crc32

from outrider.telemetry.record import Range, Row

# Beside what the writer's connection has: a drain reads each page once.
_PRAGMAS: Final = ("PRAGMA query_only=ON", "PRAGMA cell_size_check=ON", "PRAGMA cache_size=-256")
_QUERY: Final = "SELECT seq, crc, body FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"

# Row(...) takes three times as long.
_row: Callable[[tuple[int, bytes]], Row] = partial(tuple.__new__, Row)


class Claims:
    """The rows in flight. From any thread; ``seqs`` is only looked at in ``dropping``."""

    def __init__(self, path: Path) -> None:
        """The file is opened by the first ``take``."""
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._reading = threading.Lock()
        self._changing = threading.RLock()  # never waits for _reading
        self._seqs: set[int] = set()
        self._drops = 0  # so often rows were dropped: what was read before may be gone

    def take(self, limit: int, *, after_seq: int, max_bytes: int) -> tuple[list[Row], list[int]]:
        """The first ``limit`` rows above ``after_seq``, at most ``max_bytes`` of bodies (one at least), in flight now.

        Returns:
            The rows and no numbers; or, where some are not what was written, theirs, and nothing is in flight.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        while True:
            drops = self._drops
            rows, bad = self._read(limit, after_seq, max_bytes)
            with self._changing:
                if drops == self._drops:
                    if not bad:
                        self._seqs.update([seq for seq, _ in rows])
                    return rows, bad

    @contextlib.contextmanager
    def dropping(self) -> Iterator[set[int]]:
        """From the choice of what is dropped to its commit nothing is taken. Gives the numbers in flight."""
        with self._changing:
            try:
                yield self._seqs
            finally:
                self._drops += 1

    def let_go(self, spans: Iterable[Range]) -> None:
        """These are no longer in flight."""
        with self._changing:
            for first, last in spans:
                if last - first < len(self._seqs):
                    self._seqs.difference_update(range(first, last + 1))
                else:  # a receipt may name more numbers than there are
                    self._seqs = {seq for seq in self._seqs if not first <= seq <= last}

    def close(self) -> None:
        """Let go of the file."""
        with self._reading:
            self._closed = True
            if self._db is not None:
                self._db.close()

    def _read(self, limit: int, after_seq: int, max_bytes: int) -> tuple[list[Row], list[int]]:
        rows: list[Row] = []
        bad: list[int] = []
        # Closed at once: a query that is left half read would keep the journal from being taken into the file.
        with self._reading, contextlib.closing(self._open().execute(_QUERY, (after_seq, limit))) as found:
            for seq, crc, body in found:
                if type(body) is not bytes or crc32(body) != crc:
                    bad.append(seq)
                    continue
                max_bytes -= len(body)
                if max_bytes < 0 and rows:
                    break
                rows.append(_row((seq, body)))
        return ([], bad) if bad else (rows, bad)

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise sqlite3.ProgrammingError("it is closed")
        if self._db is None:
            self._db = _connect(self._path)
        return self._db


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        for pragma in _PRAGMAS:
            db.execute(pragma)
    except BaseException:
        db.close()
        raise
    return db
