"""The durable queue between a device and whoever takes its records: one SQLite file, one stream, one process.

The account (enqueued = delivered + pending + dropped) is one row that changes in the transaction that moves the
records, so that it holds at every moment, a kill -9 included.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from outrider.telemetry.record import Range, Row, to_ranges
from outrider_runtimes.errors import TelemetryError

log = logging.getLogger(__name__)

LOW: Final = 0
NORMAL: Final = 1
HIGH: Final = 2

# What SQLite keeps beside a body: the row's cells, its entry in the index, its share of the pages.
ROW_OVERHEAD_BYTES: Final = 64
_APPLICATION_ID: Final = 0x4F755472  # "OuTr"
_SCHEMA_VERSION: Final = 1

# What SQLite says of a file whose bytes were changed, beside its own word for it. A wrong version byte in the header
# makes a file "readonly"; one that truly is has failed at the lock file before.
_SIGNS_OF_CORRUPTION: Final = (
    "malformed",
    "no such table",
    "no such column",
    "unsupported file format",
    "readonly database",
)

_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA journal_size_limit=4194304",
    "PRAGMA cell_size_check=ON",
    "PRAGMA temp_store=MEMORY",
)
_SCHEMA = (
    """CREATE TABLE rows(
        seq INTEGER PRIMARY KEY, priority INTEGER NOT NULL, size_bytes INTEGER NOT NULL, crc INTEGER NOT NULL,
        body BLOB NOT NULL)""",
    "CREATE INDEX droppable ON rows(priority, seq, size_bytes)",
    """CREATE TABLE account(
        id INTEGER PRIMARY KEY CHECK (id = 1), stream TEXT NOT NULL, clean INTEGER NOT NULL, next_seq INTEGER NOT NULL,
        enqueued INTEGER NOT NULL, delivered INTEGER NOT NULL, pending INTEGER NOT NULL, dropped INTEGER NOT NULL,
        pending_bytes INTEGER NOT NULL,
        CHECK (enqueued = delivered + pending + dropped))""",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Where every record that was ever committed is: ``enqueued == delivered + pending + dropped``.

    Attributes:
        enqueued: committed to disk since the stream began.
        delivered: the consumer's receipt is in the spool.
        pending: waiting in the spool, in flight or not.
        dropped: given up to stay within ``max_bytes``, or unreadable on the disk.
    """

    enqueued: int
    delivered: int
    pending: int
    dropped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A record on its way into the spool: its JSON object without ``seq``, and its class in the drop order."""

    body: bytes
    priority: int = NORMAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """What one transaction did: the numbers of the drafts, in order, and how many records were newly delivered."""

    seqs: tuple[int, ...]
    delivered: int


class Spool:
    """A queue on disk. Safe from several threads; one process at a time.

    Attributes:
        path: the SQLite file; ``.lock`` beside it says which process has it.
        stream: the UUID that was made with the file.
        last_seq: the highest number given or skipped so far.
        recovered: why the file that was found could not be used and a fresh stream was begun; None when all was well.
            The file that was found is kept as ``.corrupt``.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 64 * 1024 * 1024) -> None:
        """Open or make the file.

        Args:
            path: of the file; its folder is made where it is missing.
            max_bytes: of all pending records together, with 64 each for what SQLite keeps beside them; the file is a
                little larger.

        Raises:
            TelemetryError: another process has it, the folder cannot be written, the disk is full, or a newer version
                wrote it.
        """
        if max_bytes < 1:
            raise TelemetryError(f"max_bytes is {max_bytes}, expected a number above 0")
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.recovered: str | None = None
        self._mutex = threading.RLock()
        self._held: set[int] = set()
        self._damaged = False
        self._lock = _lock(self.path)
        try:
            self._db = self._open()
            self.stream, self.last_seq = self._begin()
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

        Where the records do not fit into ``max_bytes``, the oldest of the lowest priority are dropped and counted, new
        ones included; records that are in flight stay.

        Raises:
            TelemetryError: nothing was changed: the disk is full or fails, or the spool is closed.
        """
        with self._mutex, self._transaction("commit") as db:
            delivered, freed_bytes, done = self._deliver(db, ranges)
            first = self.last_seq + 1
            sizes = [len(draft.body) + ROW_OVERHEAD_BYTES for draft in drafts]
            db.executemany(
                "INSERT INTO rows VALUES (?,?,?,?,?)",
                (
                    (seq, draft.priority, size, zlib.crc32(draft.body), draft.body)
                    for seq, (draft, size) in enumerate(zip(drafts, sizes, strict=True), first)
                ),
            )
            last = first + len(drafts) - 1
            db.execute(
                "UPDATE account SET next_seq=?, enqueued=enqueued+?, delivered=delivered+?, pending=pending+?, "
                "pending_bytes=pending_bytes+?",
                (last + lost + 1, len(drafts), delivered, len(drafts) - delivered, sum(sizes) - freed_bytes),
            )
            if drafts:
                self._evict(db)
            # Inside the transaction's block: a failing COMMIT leaves these as they were.
            db.execute("COMMIT")
            self.last_seq = last + lost
            self._held.difference_update(done)
        return Committed(seqs=tuple(range(first, last + 1)), delivered=delivered)

    def peek(self, limit: int, *, after_seq: int = 0) -> list[Row]:
        """The first ``limit`` pending records above ``after_seq``, in order; nothing is changed."""
        with self._mutex, self._reading() as db:
            query = "SELECT seq, body FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"
            return [Row(seq, body) for seq, body in db.execute(query, (after_seq, limit))]

    def claim(self, limit: int, *, after_seq: int, max_bytes: int) -> list[Row]:
        """As ``peek``, at most ``max_bytes`` of bodies (one record at least), and from now on in flight.

        A record whose bytes are not those that were written is dropped and counted.
        """
        with self._mutex:
            while True:
                rows, bad = self._read_sound(limit, after_seq=after_seq, max_bytes=max_bytes)
                if not bad:
                    self._held.update(row.seq for row in rows)
                    return rows
                log.error("%s: dropped %d records whose checksum is wrong: %s", self.path, len(bad), to_ranges(bad))
                self._drop(bad)

    def release(self, seqs: Iterable[int]) -> None:
        """These are no longer in flight: they may be dropped or claimed again."""
        with self._mutex:
            self._held.difference_update(seqs)

    def oldest_seq(self) -> int:
        """The lowest pending number; the next one to be given where nothing is pending."""
        with self._mutex, self._reading() as db:
            (seq,) = db.execute("SELECT min(seq) FROM rows").fetchone()
            return self.last_seq + 1 if seq is None else int(seq)

    def account(self) -> Account:
        """The account as it is committed."""
        with self._mutex, self._reading() as db:
            row = db.execute("SELECT enqueued, delivered, pending, dropped FROM account").fetchone()
            return Account(enqueued=row[0], delivered=row[1], pending=row[2], dropped=row[3])

    def close(self) -> None:
        """Mark a clean stop and let go of the file. A second call does nothing."""
        with self._mutex:
            if self._lock.closed:
                return
            try:
                if not self._damaged:
                    self._db.execute("UPDATE account SET clean=1")
            except sqlite3.Error as error:
                # The next opening takes it for an unclean stop, which costs one number.
                log.warning("%s: the clean stop could not be noted: %s", self.path, error)
            finally:
                self._db.close()
                self._lock.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except _Corrupt as error:
            self.recovered = str(error)
        kept = _quarantine(self.path)
        log.error("%s: %s; kept as %s, a fresh stream begins", self.path, self.recovered, kept)
        return _connect(self.path)

    def _begin(self) -> tuple[str, int]:
        """Clear the mark of a clean stop; without one, burn a number: the consumer sees that something may be lost."""
        with self._transaction("open") as db:
            stream, next_seq, clean = db.execute("SELECT stream, next_seq, clean FROM account").fetchone()
            next_seq += 0 if clean else 1
            db.execute("UPDATE account SET clean=0, next_seq=?", (next_seq,))
            db.execute("COMMIT")
        return str(stream), int(next_seq) - 1

    def _deliver(self, db: sqlite3.Connection, ranges: Iterable[Range]) -> tuple[int, int, list[int]]:
        done: list[int] = []
        freed_bytes = 0
        for first, last in ranges:
            query = "DELETE FROM rows WHERE seq BETWEEN ? AND ? RETURNING seq, size_bytes"
            for seq, size in db.execute(query, (first, last)).fetchall():
                done.append(seq)
                freed_bytes += size
        return len(done), freed_bytes, done

    def _evict(self, db: sqlite3.Connection) -> None:
        (pending_bytes,) = db.execute("SELECT pending_bytes FROM account").fetchone()
        excess = pending_bytes - self.max_bytes
        if excess <= 0:
            return
        victims: list[int] = []
        for seq, size in db.execute("SELECT seq, size_bytes FROM rows ORDER BY priority, seq"):
            if seq in self._held:
                continue
            victims.append(seq)
            excess -= size
            if excess <= 0:
                break
        _delete_dropped(db, victims)

    def _drop(self, seqs: list[int]) -> None:
        with self._transaction("drop") as db:
            _delete_dropped(db, seqs)
            db.execute("COMMIT")

    def _read_sound(self, limit: int, *, after_seq: int, max_bytes: int) -> tuple[list[Row], list[int]]:
        rows: list[Row] = []
        bad: list[int] = []
        with self._reading() as db:
            query = "SELECT seq, crc, body FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"
            for seq, crc, body in db.execute(query, (after_seq, limit)):
                max_bytes -= len(body)
                if rows and max_bytes < 0:
                    break
                if not isinstance(body, bytes) or zlib.crc32(body) != crc:
                    bad.append(seq)
                else:
                    rows.append(Row(seq, body))
        return rows, bad

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._lock.closed:
            raise TelemetryError(f"the spool {self.path} is closed")
        try:
            yield self._db
        except sqlite3.Error as error:
            raise self._failed("read", error) from error

    @contextlib.contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        """The block ends with its own COMMIT; whatever it raises undoes it."""
        if self._lock.closed:
            raise TelemetryError(f"the spool {self.path} is closed")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
        except BaseException as error:
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._failed(what, error) from error
            raise

    def _failed(self, what: str, error: sqlite3.Error) -> TelemetryError:
        if _is_corruption(error):
            # Left without the mark of a clean stop, so that the next opening examines the whole file.
            self._damaged = True
        return TelemetryError(
            f"the spool {self.path} failed to {what}: {error}", hint="check the free space and the health of its disk"
        )


class _Corrupt(Exception):
    """The file cannot be used; the message says why."""


def _lock(path: Path) -> io.FileIO:
    import fcntl

    holder = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = io.FileIO(holder, "a+")
    except OSError as error:
        raise TelemetryError(
            f"the spool's folder {path.parent} cannot be written: {error}",
            hint="name one that can be written by state=",
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read(32).decode("ascii", "replace").strip() or "unknown"
        file.close()
        raise TelemetryError(
            f"the spool {path} is in use by process {pid}",
            hint="give each process a device id or a state directory of its own",
        ) from None
    with contextlib.suppress(OSError):  # who holds it is for people; on a full disk it stays unsaid
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
    return file


def _connect(path: Path) -> sqlite3.Connection:
    """An open, examined database. Raises _Corrupt, or TelemetryError where the file is sound but cannot be used."""
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        fresh = _identify(db, path)
        for pragma in _PRAGMAS:  # WAL writes into the file: only when it is known to be ours
            db.execute(pragma).fetchall()
        if fresh:
            _create(db)
        else:
            _examine(db)
        return db
    except BaseException as error:
        if db is not None:
            db.close()
        if not isinstance(error, sqlite3.Error):
            raise
        if _is_corruption(error):
            raise _Corrupt(str(error)) from error
        raise TelemetryError(
            f"the spool {path} cannot be opened: {error}",
            hint="check that it may be written and that its disk is not full",
        ) from error


def _identify(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is still empty. Raises _Corrupt for another file, TelemetryError for a newer spool."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == _APPLICATION_ID and version > _SCHEMA_VERSION:
        raise TelemetryError(
            f"the spool {path} was written by a newer version (schema {version}, this one knows {_SCHEMA_VERSION})",
            hint="upgrade outrider, or move the file away",
        )
    if not tables and not version:
        return True
    if application != _APPLICATION_ID or version != _SCHEMA_VERSION:
        raise _Corrupt(f"not a spool (application {application:#x}, schema {version})")
    return False


def _create(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO account VALUES (1,?,1,1,0,0,0,0,0)", (str(uuid.uuid4()),))
    db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
    db.execute("COMMIT")


def _examine(db: sqlite3.Connection) -> None:
    """The account against the rows; after an unclean stop every page too."""
    found = db.execute(
        "SELECT clean, enqueued, delivered, pending, dropped, pending_bytes, next_seq FROM account"
    ).fetchall()
    if len(found) != 1 or not all(isinstance(value, int) and value >= 0 for value in found[0]):
        raise _Corrupt("the account cannot be read")
    clean, enqueued, delivered, pending, dropped, pending_bytes, next_seq = found[0]
    rows, size_bytes, last = db.execute("SELECT count(*), coalesce(sum(size_bytes), 0), max(seq) FROM rows").fetchone()
    if (rows, size_bytes) != (pending, pending_bytes) or enqueued != delivered + pending + dropped:
        raise _Corrupt(f"the account says {pending} records of {pending_bytes} bytes, there are {rows} of {size_bytes}")
    if last is not None and last >= next_seq:
        raise _Corrupt(f"record {last} is above the next number {next_seq}")
    if not clean:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Corrupt(str(verdict))


def _delete_dropped(db: sqlite3.Connection, seqs: Sequence[int]) -> None:
    freed_bytes = 0
    for first, last in to_ranges(sorted(seqs)):
        query = "DELETE FROM rows WHERE seq BETWEEN ? AND ? RETURNING size_bytes"
        freed_bytes += sum(size for (size,) in db.execute(query, (first, last)).fetchall())
    db.execute(
        "UPDATE account SET pending=pending-?, dropped=dropped+?, pending_bytes=pending_bytes-?",
        (len(seqs), len(seqs), freed_bytes),
    )


def _is_corruption(error: sqlite3.Error) -> bool:
    # OperationalError is a DatabaseError too, but says that the file could not be used now, not that it is broken.
    text = str(error)
    return (
        isinstance(error, sqlite3.DatabaseError)
        and not isinstance(error, (sqlite3.OperationalError, sqlite3.ProgrammingError, sqlite3.NotSupportedError))
    ) or any(sign in text for sign in _SIGNS_OF_CORRUPTION)


def _quarantine(path: Path) -> Path:
    """Set the file and its journal aside under one name, in place of what was set aside before."""
    kept = path.with_name(path.name + ".corrupt")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{kept}{suffix}").unlink(missing_ok=True)
        if suffix != "-shm":
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{suffix}").rename(f"{kept}{suffix}")
    Path(f"{path}-shm").unlink(missing_ok=True)
    return kept
