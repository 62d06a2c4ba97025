"""A spool's file on the disk: what is in it, whether that is sound, and older forms of it."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from outrider.bundle.files import sync_directory
from outrider.telemetry.record import to_ranges
from outrider.telemetry.spoollock import Given
from outrider_runtimes.errors import TelemetryError

APPLICATION_ID: Final = 0x4F755472  # "OuTr"
SCHEMA_VERSION: Final = 2

# What SQLite says of a file whose bytes were changed, beside its own word for it. A wrong version byte in the header
# makes a file "readonly"; one that truly is has failed at the lock file before.
_SIGNS_OF_CORRUPTION: Final = (
    "malformed",
    "no such table",
    "no such column",
    "unsupported file format",
    "readonly database",
)
# A commit of one record writes two pages, and a card wears by what is written: of SQLite's own 4096, 1.4 times as much.
PAGE_BYTES: Final = 2048
PRAGMAS: Final = (
    f"PRAGMA page_size={PAGE_BYTES}",  # of a new file; one of an earlier version keeps its own
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA journal_size_limit=4194304",
    "PRAGMA cell_size_check=ON",
    "PRAGMA temp_store=MEMORY",
    # Some builds write zeros over each page that becomes free: twice the bytes for a record that was delivered.
    "PRAGMA secure_delete=FAST",
)
_SCHEMA = (
    """CREATE TABLE rows(
        seq INTEGER PRIMARY KEY, priority INTEGER NOT NULL, size_bytes INTEGER NOT NULL, crc INTEGER NOT NULL,
        body BLOB NOT NULL, lived_ms INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE account(
        id INTEGER PRIMARY KEY CHECK (id = 1), stream TEXT NOT NULL, clean INTEGER NOT NULL, next_seq INTEGER NOT NULL,
        enqueued INTEGER NOT NULL, delivered INTEGER NOT NULL, pending INTEGER NOT NULL, dropped INTEGER NOT NULL,
        pending_bytes INTEGER NOT NULL, expired INTEGER NOT NULL DEFAULT 0, poisoned INTEGER NOT NULL DEFAULT 0,
        damaged INTEGER NOT NULL DEFAULT 0, boot TEXT NOT NULL DEFAULT '', monotonic_ms INTEGER NOT NULL DEFAULT 0,
        lived_ms INTEGER NOT NULL DEFAULT 0, seal INTEGER NOT NULL DEFAULT 0,
        CHECK (enqueued = delivered + pending + dropped))""",
)
# By the version that each begins with.
_MIGRATIONS = {
    1: (
        "DROP INDEX droppable",  # it cost a page a commit
        "ALTER TABLE rows ADD COLUMN lived_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN expired INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN poisoned INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN damaged INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN boot TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE account ADD COLUMN monotonic_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN lived_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE account ADD COLUMN seal INTEGER NOT NULL DEFAULT 0",
    )
}
_COUNTERS: Final = (
    "enqueued, delivered, pending, dropped, pending_bytes, next_seq, expired, poisoned, damaged, monotonic_ms, lived_ms"
)
_WAL_HEADER = struct.Struct(">8I")
_FRAME_HEADER = struct.Struct(">6I")


class Corrupt(Exception):
    """The file cannot be used, and was set aside; the message says why."""


class Lived(NamedTuple):
    """How long the device was on while it had this spool: what age is counted by, since no wall clock can be trusted.

    Attributes:
        boot: the boot in which it was noted.
        monotonic_ms: of that boot's clock, when it was noted.
        lived_ms: the sum up to then.
    """

    boot: str
    monotonic_ms: int
    lived_ms: int

    def at(self, boot: str, monotonic_ms: int) -> Lived:
        """The same later. In another boot nothing is added: nobody knows how long the device was off."""
        passed_ms = max(0, monotonic_ms - self.monotonic_ms) if boot == self.boot else 0
        return Lived(boot, monotonic_ms, self.lived_ms + passed_ms)


def connect(path: Path, *, given: Given | None = None) -> sqlite3.Connection:
    """An open, examined database; one that is damaged is set aside.

    Args:
        given: the numbers that are known from elsewhere to have been given.

    Raises:
        Corrupt: it was.
        TelemetryError: the file is sound but cannot be used.
    """
    db: sqlite3.Connection | None = None
    try:
        committed = _committed_frames(path)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        version = _identify(db, path)
        for pragma in PRAGMAS:  # WAL writes into the file: only when it is known to be ours
            db.execute(pragma).fetchall()
        _check_journal(db, committed)
        if version == 0:
            _create(db)
        else:
            _migrate(db, version)
            _check_numbers(db, given)
            _examine(db, sealed=version == SCHEMA_VERSION)
        return db
    except BaseException as error:
        damaged = isinstance(error, Corrupt) or (isinstance(error, sqlite3.Error) and is_corruption(error))
        try:
            if damaged:  # before it is closed: SQLite then deletes the journal, which may be what shows the damage
                set_aside(path)
        finally:
            if db is not None:
                db.close()
        if not isinstance(error, sqlite3.Error):
            raise
        if damaged:
            raise Corrupt(str(error)) from error
        raise TelemetryError(
            f"the spool {path} cannot be opened: {error}",
            hint="check that it may be written and that its disk is not full",
        ) from error


def delete_dropped(db: sqlite3.Connection, seqs: Sequence[int], *, why: str = "") -> None:
    """Within a transaction: these rows are dropped. ``why`` is the account's counter beside ``dropped``, if any."""
    sizes: list[int] = []
    for first, last in to_ranges(sorted(seqs)):  # what left meanwhile was counted as it left
        query = "DELETE FROM rows WHERE seq BETWEEN ? AND ? RETURNING size_bytes"
        sizes += [size for (size,) in db.execute(query, (first, last)).fetchall()]
    count_dropped(db, len(sizes), sum(sizes), why=why)


def count_dropped(db: sqlite3.Connection, count: int, freed_bytes: int, *, why: str = "") -> None:
    """Within a transaction: so many rows, which are gone, were dropped."""
    also = f", {why}={why}+{count}" if why else ""
    db.execute(
        f"UPDATE account SET pending=pending-?, dropped=dropped+?, pending_bytes=pending_bytes-?{also}",
        (count, count, freed_bytes),
    )


def is_corruption(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is broken, not that it could not be used now."""
    text = str(error)
    # OperationalError is a DatabaseError too, but says that the file could not be used now.
    return (
        isinstance(error, sqlite3.DatabaseError)
        and not isinstance(error, (sqlite3.OperationalError, sqlite3.ProgrammingError, sqlite3.NotSupportedError))
    ) or any(sign in text for sign in _SIGNS_OF_CORRUPTION)


def is_no_room(error: TelemetryError) -> bool:
    """Whether an error may come of a full disk, where SQLite often says no more than that writing failed."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(cause, sqlite3.OperationalError) and any(sign in str(cause) for sign in ("full", "disk I/O"))


def was_left_open(path: Path) -> bool:
    """Whether it was not closed cleanly, by what lies beside it: to open it takes as long as to read all of it."""
    return Path(f"{path}-wal").exists() or aside(path).exists()


def aside(path: Path) -> Path:
    """What a damaged spool is called until a fresh one is in its place; where it is there, a recovery was cut short."""
    return path.with_name(path.name + ".damaged")


def set_aside(path: Path) -> Path:
    """Rename the file, then its journal; again where that was cut short. Raises TelemetryError."""
    damaged = aside(path)
    try:
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{suffix}").rename(f"{damaged}{suffix}")
        Path(f"{path}-shm").unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise _not_recovered(path, error) from error
    return damaged


def fresh(path: Path) -> Path:
    """Where the spool is built that takes the place of a damaged one, without what a cut recovery left there."""
    found = path.with_name(path.name + ".fresh")
    try:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{found}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise _not_recovered(path, error) from error
    return found


def put_in_place(path: Path, built: Path) -> None:
    """What was built is the spool from now on. What an earlier recovery kept goes. Raises TelemetryError."""
    try:
        remove_kept(path)
        built.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _not_recovered(path, error) from error


def keep(path: Path, *, max_bytes: int) -> bool:
    """End a recovery: keep the damaged spool, or delete it where it is too large. Gives whether it is kept.

    The journal goes first, so that it is never taken for that of another file.
    """
    damaged = aside(path)
    kept = aside_bytes(path) <= max_bytes
    try:
        for suffix in ("-shm", "-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                found = Path(f"{damaged}{suffix}")
                if kept and suffix != "-shm":
                    found.replace(path.with_name(f"{path.name}.corrupt{suffix}"))
                else:
                    found.unlink()
    except OSError as error:
        raise _not_recovered(path, error) from error
    return kept


def aside_bytes(path: Path) -> int:
    """What a damaged spool takes of its disk; 0 where there is none."""
    return _bytes_of(path, (".damaged", ".damaged-wal"))


def kept_bytes(path: Path) -> int:
    """What a spool's quarantined file takes of its disk; 0 where there is none."""
    return _bytes_of(path, (".corrupt", ".corrupt-wal"))


def _bytes_of(path: Path, suffixes: Sequence[str]) -> int:
    total = 0
    for suffix in suffixes:
        with contextlib.suppress(FileNotFoundError):
            total += path.with_name(path.name + suffix).stat().st_size
    return total


def remove_kept(path: Path) -> None:
    """Delete a spool's quarantined file."""
    for suffix in (".corrupt", ".corrupt-wal", ".corrupt-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _not_recovered(path: Path, error: OSError) -> TelemetryError:
    return TelemetryError(
        f"the spool {path} is damaged and cannot be recovered: {error}",
        hint="check that its folder may be written and that its disk is not full",
    )


def _identify(db: sqlite3.Connection, path: Path) -> int:
    """The version that wrote the file, 0 while it is empty. Raises Corrupt, or TelemetryError for a newer one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise TelemetryError(
            f"the spool {path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})",
            hint="upgrade outrider, or move the file away",
        )
    if not tables and not version:
        return 0
    if application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION:
        raise Corrupt(f"not a spool (application {application:#x}, schema {version})")
    return int(version)


def _create(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute(
        "INSERT INTO account(id, stream, clean, next_seq, enqueued, delivered, pending, dropped, pending_bytes) "
        "VALUES (1,?,1,1,0,0,0,0,0)",
        (str(uuid.uuid4()),),
    )
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring an older file up to date, all or nothing."""
    if version == SCHEMA_VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for old in range(version, SCHEMA_VERSION):
            for statement in _MIGRATIONS[old]:
                db.execute(statement)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _check_journal(db: sqlite3.Connection, committed: Callable[[int], int]) -> None:
    """Whether SQLite took all that the journal had. A power cut may have left half of one commit, not of two."""
    (taken,) = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1:2]
    lost = committed(max(0, taken))
    if lost > 1:
        # Their numbers were given: to give them again to other records would make those look like duplicates.
        raise Corrupt(f"the journal has lost {lost} commits")


def _check_numbers(db: sqlite3.Connection, given: Given | None) -> None:
    """Whether the file is older than the numbers that were given: its journal was cut, or it was copied back."""
    found = db.execute("SELECT stream, next_seq FROM account").fetchone()
    if given is not None and found is not None and found[0] == given.stream and found[1] < given.next_seq:
        raise Corrupt(f"the next number is {found[1]}, but all below {given.next_seq} were given")


def seal_of(db: sqlite3.Connection) -> int:
    """A checksum of the account and of the highest record: put on it at a clean stop, compared at the next start."""
    account = db.execute(f"SELECT {_COUNTERS}, stream FROM account").fetchone()
    (last,) = db.execute("SELECT max(seq) FROM rows").fetchone()
    return zlib.crc32(repr((account, last)).encode())


def _examine(db: sqlite3.Connection, *, sealed: bool) -> None:
    """After a clean stop the seal; otherwise the account against the rows, and every page."""
    found = db.execute(f"SELECT clean, seal, {_COUNTERS} FROM account").fetchall()
    if len(found) != 1 or not all(isinstance(value, int) and value >= 0 for value in found[0]):
        raise Corrupt("the account cannot be read")
    clean, seal, enqueued, delivered, pending, dropped, pending_bytes, next_seq, *reasons = found[0]
    if clean and sealed:
        if seal_of(db) != seal:
            raise Corrupt("the account was changed since the clean stop")
        return
    rows, size_bytes, last = db.execute("SELECT count(*), coalesce(sum(size_bytes), 0), max(seq) FROM rows").fetchone()
    if (rows, size_bytes) != (pending, pending_bytes) or enqueued != delivered + pending + dropped:
        raise Corrupt(f"the account says {pending} records of {pending_bytes} bytes, there are {rows} of {size_bytes}")
    if sum(reasons[:3]) > dropped:
        raise Corrupt(f"the account says {sum(reasons[:3])} reasons of {dropped} dropped records")
    if last is not None and last >= next_seq:
        raise Corrupt(f"record {last} is above the next number {next_seq}")
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise Corrupt(str(verdict))


def _committed_frames(path: Path) -> Callable[[int], int]:
    """Read the journal before SQLite does, which leaves out what comes after a damaged frame without a word.

    Returns:
        How many transactions end after so many frames that SQLite took; by the file format of SQLite, section 4.
    """
    ends: list[int] = []
    try:
        with path.with_name(path.name + "-wal").open("rb") as file:
            head = file.read(_WAL_HEADER.size)
            if len(head) < _WAL_HEADER.size:
                return lambda _: 0
            magic, _, page_bytes, _, *salts = _WAL_HEADER.unpack(head)
            sums, expected = salts[2:], _wal_checksum(head[:24], big=bool(magic & 1))
            if magic & ~1 != 0x377F0682 or tuple(sums) != expected or not 512 <= page_bytes <= 65536:
                return lambda _: 1_000_000  # all of it: its own header is damaged
            frame = 0
            while len(found := file.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
                _, pages, *own = _FRAME_HEADER.unpack(found)
                if own[:2] != salts[:2]:
                    break
                frame += 1
                if pages:
                    ends.append(frame)
                file.seek(page_bytes, os.SEEK_CUR)
    except OSError:
        return lambda _: 0
    return lambda taken: sum(end > taken for end in ends)


def _wal_checksum(data: bytes, *, big: bool) -> tuple[int, int]:
    one = two = 0
    words = struct.unpack(f"{'>' if big else '<'}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two
