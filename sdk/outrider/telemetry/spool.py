"""The durable queue between a device and whoever takes its records: one SQLite file, one stream, one process.

The account (enqueued = delivered + pending + dropped) is one row that changes in the transaction that moves the
records, so that it holds at every moment, a kill -9 included.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple
from zlib import crc32

from outrider.telemetry.claims import Claims
from outrider.telemetry.droppable import Cap, expire
from outrider.telemetry.record import Range, Row, to_ranges
from outrider.telemetry.salvage import salvage
from outrider.telemetry.spoolfile import (
    Corrupt,
    Lived,
    aside,
    aside_bytes,
    connect,
    delete_dropped,
    fresh,
    is_corruption,
    is_no_room,
    keep,
    kept_bytes,
    put_in_place,
    remove_kept,
    seal_of,
    set_aside,
)
from outrider.telemetry.spoollock import SpoolLock
from outrider_runtimes.clock import this_boot
from outrider_runtimes.errors import TelemetryError

log = logging.getLogger(__name__)

# The classes, in the order in which they are dropped: inputs, predictions, metrics, events.
LOWEST: Final = -1
LOW: Final = 0
NORMAL: Final = 1
HIGH: Final = 2

# What SQLite keeps beside a body: the row's cells, its entry in the index, its share of the pages.
ROW_OVERHEAD_BYTES: Final = 64

DEFAULT_MAX_BYTES: Final = 64 * 1024 * 1024  # of the records that wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Where every record that was ever committed is: ``enqueued == delivered + pending + dropped``.

    Attributes:
        enqueued: committed to disk since the stream began.
        delivered: the consumer's receipt is in the spool.
        pending: waiting in the spool, in flight or not.
        dropped: given up: the three below, and what had to go to stay within ``max_bytes``.
        expired: of these, older than ``max_age_s``.
        poisoned: of these, set aside because they did not come through while others did.
        damaged: of these, whose bytes on the disk are not those that were written.
    """

    enqueued: int
    delivered: int
    pending: int
    dropped: int
    expired: int = 0
    poisoned: int = 0
    damaged: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A record on its way into the spool: its JSON object without ``seq``, and its class in the drop order."""

    body: bytes
    priority: int = NORMAL


class Committed(NamedTuple):
    """What one transaction did: the numbers of the drafts, in order, and how many records were newly delivered."""

    seqs: tuple[int, ...]
    delivered: int


class Spool:
    """A queue on disk. Safe from several threads; one process at a time, and not over a fork.

    Attributes:
        path: the SQLite file; ``.lock`` beside it says which process has it, and which numbers it has given.
        stream: the UUID that was made with the file.
        last_seq: the highest number given or skipped so far.
        recovered: why the file that was found could not be used and a fresh stream was begun; None when all was well.
            The damaged file is kept as ``.corrupt``, where it has no more than half of ``max_bytes``.
        salvaged: how many of its records could be read and are in the fresh stream, with new numbers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_age_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        boot: str | None = None,
        held: SpoolLock | None = None,
    ) -> None:
        """Open or make the file.

        Args:
            path: of the file; its folder is made where it is missing.
            max_bytes: of all pending records together, with 64 each for what SQLite keeps beside them, and of a
                quarantined file; the spool's own is a little larger.
            max_age_s: records that waited longer are dropped. Counted is the time that the device was on, by its
                monotonic clock: where it was switched off, or its spool was not open when it went down, less.
            clock: seconds, monotonic within a boot.
            boot: the boot's id; the kernel's when None.
            held: its lock, where that was taken before; the spool closes it.

        Raises:
            TelemetryError: another process has it, the folder cannot be written, the disk is full, or a newer version
                wrote it.
        """
        if max_bytes < 1:
            raise TelemetryError(f"max_bytes is {max_bytes}, expected a number above 0")
        if max_age_s is not None and not max_age_s > 0:
            raise TelemetryError(f"max_age_s is {max_age_s}, expected a number above 0, or None")
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.max_age_s = max_age_s
        self.recovered: str | None = None
        self.salvaged = 0
        self._clock = clock
        self._boot = this_boot() if boot is None else boot
        self._mutex = threading.RLock()
        self._claims = Claims(self.path)
        self._cap = Cap(max_bytes)
        self._damaged = False
        self.stream, self.last_seq = "", 0
        self._lived = Lived(boot="", monotonic_ms=0, lived_ms=0)
        self._most_bytes = self._kept_bytes = 0
        self._process = os.getpid()
        self._lock = SpoolLock(self.path) if held is None else held
        try:
            self._start()
        except BaseException:
            self._lock.close()
            raise

    def append(self, drafts: Sequence[Draft], *, lost: int = 0) -> tuple[int, ...]:
        """Commit the drafts in one transaction and give their numbers. See ``commit``."""
        return self.commit(drafts, lost=lost).seqs

    def receive(self, ranges: Iterable[Range]) -> int:
        """A consumer's receipt: what is pending in ``ranges`` is delivered. Gives how many; a second one gives 0."""
        return self.commit(ranges=ranges).delivered

    def commit(self, drafts: Sequence[Draft] = (), *, lost: int = 0, ranges: Iterable[Range] = ()) -> Committed:
        """One transaction: add the drafts, skip ``lost`` numbers after them, deliver what the receipts name.

        With drafts, what waited longer than ``max_age_s`` is dropped and counted; where the rest does not fit into
        ``max_bytes``, the oldest of the lowest priority too, new ones included. Records that are in flight stay.

        Raises:
            TelemetryError: nothing was changed: the disk is full or fails, or the spool is closed.
        """
        spans = tuple(ranges)
        self._check_process()
        with self._mutex:  # as ``_transaction``, without a generator: this is the way of every record
            self._check_open()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return self._change(self._db, drafts, lost, spans)
            except BaseException as error:
                self._undo("commit", error)
                raise

    def _change(
        self, db: sqlite3.Connection, drafts: Sequence[Draft], lost: int, spans: tuple[Range, ...]
    ) -> Committed:
        """``commit``, within its transaction and to its end: a failing COMMIT leaves what is in memory as it was."""
        delivered, freed_bytes = _deliver(db, spans) if spans else (0, 0)
        first, lived = self.last_seq + 1, self._lived_now()
        lived_ms = lived.lived_ms
        rows = [
            (seq, each.priority, len(each.body) + ROW_OVERHEAD_BYTES, crc32(each.body), each.body, lived_ms)
            for seq, each in enumerate(drafts, first)
        ]
        count = len(rows)
        more_bytes = sum([row[2] for row in rows]) - freed_bytes
        next_seq = first + count + lost
        db.executemany("INSERT INTO rows VALUES (?,?,?,?,?,?)", rows)
        db.execute(
            "UPDATE account SET next_seq=?, enqueued=enqueued+?, delivered=delivered+?, pending=pending+?, "
            "pending_bytes=pending_bytes+?, boot=?, monotonic_ms=?, lived_ms=? WHERE id=1",
            (next_seq, count, delivered, count - delivered, more_bytes, *lived),
        )
        most_bytes = self._most_bytes + more_bytes
        if rows and (self.max_age_s is not None or self._cap.is_reached(most_bytes, kept_bytes=self._kept_bytes)):
            with self._claims.dropping() as held:
                self._expire(db, lived, held=held)
                new = ((row[0], row[1]) for row in rows)
                most_bytes = self._cap.evict(db, most_bytes, new, held=held, kept_bytes=self._kept_bytes)
                db.execute("COMMIT")
        else:
            db.execute("COMMIT")
        self.last_seq = next_seq - 1
        self._lock.note(self.stream, next_seq)
        self._lived, self._most_bytes = lived, most_bytes
        if spans:
            self._claims.let_go(spans)
        return Committed(tuple(range(first, first + count)), delivered)

    def peek(self, limit: int, *, after_seq: int = 0) -> list[Row]:
        """The first ``limit`` pending records above ``after_seq``, in order; nothing is changed."""
        with self._reading() as db:
            query = "SELECT seq, body FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"
            return [Row(seq, body) for seq, body in db.execute(query, (after_seq, limit))]

    def claim(self, limit: int, *, after_seq: int, max_bytes: int) -> list[Row]:
        """As ``peek``, at most ``max_bytes`` of bodies (one record at least), and from now on in flight.

        A record whose bytes are not those that were written is dropped and counted.
        """
        self._check_process()
        while True:
            self._check_open()
            try:
                rows, bad = self._claims.take(limit, after_seq=after_seq, max_bytes=max_bytes)
            except sqlite3.Error as error:
                raise self._failed("read", error) from error
            if not bad:
                return rows
            log.error("%s: dropped %d records whose checksum is wrong: %s", self.path, len(bad), to_ranges(bad))
            self._drop(bad, why="damaged")

    def release(self, seqs: Iterable[int]) -> None:
        """These are no longer in flight: they may be dropped or claimed again."""
        with self._mine():
            self._claims.let_go(to_ranges(sorted(seqs)))

    def set_aside(self, seq: int) -> bool:
        """A poisoned record: it is dropped and counted as such, in flight or not. False when it was not pending."""
        with self._mine():
            with self._reading() as db:
                there = db.execute("SELECT 1 FROM rows WHERE seq=?", (seq,)).fetchone() is not None
            if there:
                self._drop([seq], why="poisoned")
            self._claims.let_go((Range(seq, seq),))
            return there

    def expire(self) -> int:
        """Drop what waited longer than ``max_age_s``, as each commit of records does. Gives how many."""
        with self._transaction("expire") as db, self._claims.dropping() as held:
            lived = self._lived_now()
            expired = self._expire(db, lived, held=held)
            if expired:
                db.execute("UPDATE account SET boot=?, monotonic_ms=?, lived_ms=?", lived)
            db.execute("COMMIT")
            return expired

    def oldest_seq(self) -> int:
        """The lowest pending number; the next one to be given where nothing is pending."""
        with self._reading() as db:
            (seq,) = db.execute("SELECT min(seq) FROM rows").fetchone()
            return self.last_seq + 1 if seq is None else int(seq)

    def account(self) -> Account:
        """The account as it is committed."""
        with self._reading() as db:
            names = ("enqueued", "delivered", "pending", "dropped", "expired", "poisoned", "damaged")
            row = db.execute(f"SELECT {', '.join(names)} FROM account").fetchone()
            return Account(**dict(zip(names, row, strict=True)))

    def close(self) -> None:
        """Mark a clean stop and let go of the file. A second call does nothing, nor one in a forked child."""
        if os.getpid() != self._process:
            self._lock.close()  # the parent has it on, and after its end nobody
            return
        with self._mutex:
            if self._lock.closed:
                return
            try:
                if not self._damaged:
                    self._stop_cleanly()
            except TelemetryError as error:
                # The next opening takes it for an unclean stop, which costs one number.
                log.warning("%s: the clean stop could not be noted: %s", self.path, error)
            finally:
                self._claims.close()
                self._db.close()
                self._lock.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        try:
            self._open()
        except TelemetryError as error:
            if not (is_no_room(error) and kept_bytes(self.path)):
                raise
            log.warning("%s: %s; what an earlier recovery kept is deleted", self.path, error)
            remove_kept(self.path)
            self._open()

    def _open(self) -> None:
        if cut_short := aside(self.path).exists():
            self.recovered = self.recovered or "a recovery was cut short"
        try:
            if not cut_short or self.path.exists():
                if cut_short:  # in its last step
                    keep(self.path, max_bytes=self.max_bytes // 2)
                self._use(self.path)
                self.salvaged = self.account().enqueued if cut_short else 0
                return
        except Corrupt as error:
            self.recovered = str(error)
        try:
            self._recover()
        except Corrupt as error:
            raise TelemetryError(
                f"the spool {self.path} is damaged again while it is recovered: {error}",
                hint="check the health of its disk",
            ) from error

    def _use(self, path: Path) -> None:
        self._db = connect(path, given=self._lock.given)
        try:
            self._kept_bytes = kept_bytes(self.path)
            self._begin()
        except BaseException:
            self._db.close()
            raise

    def _recover(self) -> None:
        """Build a fresh spool with what can be read of the damaged one, which stays until that is in its place."""
        saved = salvage(set_aside(self.path))
        built = fresh(self.path)
        try:
            self._use(built)
            try:
                with self._reading() as db:
                    db.execute("PRAGMA journal_mode=DELETE").fetchall()  # one file to rename, and half the room
                kept = aside_bytes(self.path)
                self._kept_bytes = kept if kept <= self.max_bytes // 2 else 0
                self.salvaged = len(self.append([Draft(body=body, priority=priority) for priority, body in saved]))
                self._stop_cleanly()
            finally:
                self._db.close()
            put_in_place(self.path, built)
        except BaseException:
            fresh(self.path)
            raise
        self._cap.forget()
        kept_as = (
            f"kept as {self.path}.corrupt" if keep(self.path, max_bytes=self.max_bytes // 2) else "too large to keep"
        )
        log.error(
            "%s: %s; %d records can be read, a fresh stream begins with them; what was found is %s",
            *(self.path, self.recovered, len(saved), kept_as),
        )
        self._use(self.path)

    def _begin(self) -> None:
        """Clear the mark of a clean stop; without one, burn a number: the consumer sees that something may be lost."""
        with self._transaction("open") as db:
            query = "SELECT stream, next_seq, clean, boot, monotonic_ms, lived_ms, pending_bytes FROM account"
            stream, next_seq, clean, boot, monotonic_ms, lived_ms, pending_bytes = db.execute(query).fetchone()
            next_seq += 0 if clean else 1
            db.execute("UPDATE account SET clean=0, next_seq=?", (next_seq,))
            db.execute("COMMIT")
        self._lived = Lived(boot=boot, monotonic_ms=monotonic_ms, lived_ms=lived_ms)
        self.stream, self.last_seq, self._most_bytes = str(stream), int(next_seq) - 1, int(pending_bytes)
        self._lock.note(self.stream, int(next_seq))

    def _stop_cleanly(self) -> None:
        lived = self._lived_now()
        with self._transaction("close") as db:
            db.execute("UPDATE account SET boot=?, monotonic_ms=?, lived_ms=?", lived)
            db.execute("UPDATE account SET clean=1, seal=?", (seal_of(db),))
            db.execute("COMMIT")

    def _lived_now(self) -> Lived:
        return self._lived.at(self._boot, int(self._clock() * 1000))

    def _expire(self, db: sqlite3.Connection, lived: Lived, *, held: Collection[int]) -> int:
        if self.max_age_s is None:
            return 0
        return expire(db, lived.lived_ms - int(self.max_age_s * 1000), held=held)

    def _drop(self, seqs: list[int], *, why: str) -> None:
        with self._transaction("drop") as db, self._claims.dropping():
            delete_dropped(db, seqs, why=why)
            db.execute("COMMIT")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mine():
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._failed("read", error) from error

    @contextlib.contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        """The block ends with its own COMMIT; whatever it raises undoes it."""
        self._check_process()
        with self._mutex:  # as ``_mine``, which would be a second generator for each commit
            self._check_open()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
            except BaseException as error:
                self._undo(what, error)
                raise

    def _undo(self, what: str, error: BaseException) -> None:
        """A transaction that ``error`` ended. Raises TelemetryError where that is SQLite's."""
        self._cap.forget()
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise self._failed(what, error) from error

    @contextlib.contextmanager
    def _mine(self) -> Iterator[None]:
        """One thread at a time, of the process that opened it: SQLite forbids a connection that came by a fork."""
        self._check_process()  # before the lock, which a thread of the parent may have for ever
        with self._mutex:
            self._check_open()
            yield

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise TelemetryError(
                f"the spool {self.path} was opened by process {self._process}, this is {os.getpid()}",
                hint="open the reporter after the fork, with a device id of its own",
            )

    def _check_open(self) -> None:
        if self._lock.closed:
            raise TelemetryError(f"the spool {self.path} is closed")

    def _failed(self, what: str, error: sqlite3.Error) -> TelemetryError:
        if is_corruption(error):
            # Left without the mark of a clean stop, so that the next opening examines the whole file.
            self._damaged = True
        return TelemetryError(
            f"the spool {self.path} failed to {what}: {error}", hint="check the free space and the health of its disk"
        )


def _deliver(db: sqlite3.Connection, spans: Iterable[Range]) -> tuple[int, int]:
    """Within a transaction: delete what the receipts name. Gives how many rows, and the bytes of them."""
    count = freed_bytes = 0
    for span in spans:  # RETURNING would put the rows aside first: twice the time
        query = "SELECT coalesce(sum(size_bytes), 0) FROM rows WHERE seq BETWEEN ? AND ?"
        freed_bytes += db.execute(query, span).fetchone()[0]
        count += db.execute("DELETE FROM rows WHERE seq BETWEEN ? AND ?", span).rowcount
    return count, freed_bytes
