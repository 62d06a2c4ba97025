"""What is kept of a damaged spool, and spools of an older version."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from outrider.telemetry.record import Range
from outrider.telemetry.salvage import salvage
from outrider.telemetry.spool import HIGH, LOW, ROW_OVERHEAD_BYTES, Account, Spool
from outrider.telemetry.spoolfile import PAGE_BYTES
from outrider.telemetry.spoollock import Given, SpoolLock
from support.telemetry import a_draft


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry" / "pi-07.sqlite"


def fill(path: Path, count: int = 400) -> list[bytes]:
    """A closed spool of so many records. Gives their bodies."""
    drafts = [a_draft(number, size_bytes=200, priority=LOW if number % 2 else HIGH) for number in range(count)]
    with Spool(path) as spool:
        spool.append(drafts)
    return [draft.body for draft in drafts]


def overwrite(path: Path, page: int, *, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(rng.randbytes(PAGE_BYTES))


@pytest.mark.parametrize("seed", range(6))
def test_pages_that_are_gone_take_only_their_own_records_with_them(path: Path, seed: int) -> None:
    bodies = fill(path)
    rng = random.Random(seed)
    pages = path.stat().st_size // PAGE_BYTES
    damaged = rng.sample(range(4, pages), 2)
    for page in damaged:
        overwrite(path, page, rng=rng)
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE account SET clean=0")
    with Spool(path) as spool:
        found = [row.body for row in spool.peek(1000)]
        assert spool.recovered
        assert spool.salvaged == len(found) == spool.account().enqueued
    assert found == [body for body in bodies if body in set(found)], "in their order, none twice, none made up"
    assert len(found) >= 400 - 2 * 16, "a page holds 16 at most"


def test_the_damaged_file_is_not_changed_by_reading_it(path: Path) -> None:
    with Spool(path) as spool:
        spool.append([a_draft(number) for number in range(50)])
        image = path.parent.with_name("image")
        shutil.copytree(path.parent, image)  # as a crash leaves it: all of it in the journal
    crashed = image / path.name
    before = {file.name: file.read_bytes() for file in image.iterdir() if not file.name.endswith("-shm")}
    assert len(salvage(crashed)) == 50
    assert {file.name: file.read_bytes() for file in image.iterdir()} == before


def test_records_keep_their_class_and_whose_bytes_changed_do_not_come_back(path: Path) -> None:
    fill(path, 4)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE rows SET body=CAST(replace(CAST(body AS TEXT), 'number', 'nvmber') AS BLOB) WHERE seq=2")
    saved = salvage(path)
    assert [priority for priority, _ in saved] == [HIGH, HIGH, LOW]
    assert all(b"number" in body for _, body in saved)


def test_a_journal_that_lost_commits_is_damage_and_not_an_older_state(path: Path) -> None:
    """SQLite leaves out what comes after a damaged frame and says nothing; numbers would be given twice."""
    with Spool(path) as spool:
        stream = spool.stream
        for number in range(10):
            spool.append([a_draft(number)])
        image = path.parent.with_name("image")
        shutil.copytree(path.parent, image)
    journal = image / (path.name + "-wal")
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with Spool(image / path.name) as spool:
        assert "lost" in str(spool.recovered)
        assert spool.stream != stream
        assert 1 <= spool.salvaged < 10


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.7, 0.9, 0.99])
def test_a_journal_that_was_cut_gives_no_number_twice(path: Path, share: float) -> None:
    """Its rest is sound, and a shorter history: what the consumer has under a number is not what comes now."""
    with Spool(path) as spool:
        stream = spool.stream
        for number in range(0, 400, 20):
            spool.append([a_draft(at, size_bytes=200) for at in range(number, number + 20)])
        image = path.parent.with_name("image")
        shutil.copytree(path.parent, image)
    journal = image / (path.name + "-wal")
    os.truncate(journal, int(share * journal.stat().st_size))
    with Spool(image / path.name) as spool:
        assert spool.stream != stream
        assert (spool.recovered is None) == (share == 0.0)  # then there is nothing at all, as in a new file
    with Spool(image / path.name) as spool:
        assert spool.recovered is None


def test_an_older_file_that_is_copied_back_begins_a_fresh_stream(path: Path) -> None:
    fill(path, 10)
    older = path.read_bytes()
    with Spool(path) as spool:
        stream = spool.stream
        spool.append([a_draft(number) for number in range(10)])
    path.write_bytes(older)
    with Spool(path) as spool:
        assert spool.recovered == "the next number is 11, but all below 21 were given"
        assert spool.stream != stream
        assert spool.salvaged == 10


@pytest.mark.parametrize(
    "text", [b"", b"123\n", b"\xff" * 88, b"9" * 200], ids=["empty", "an older one", "no text", "digits"]
)
def test_a_note_that_cannot_be_read_says_nothing(path: Path, text: bytes) -> None:
    fill(path, 10)
    path.with_name(path.name + ".lock").write_bytes(text)
    with Spool(path) as spool:
        assert spool.recovered is None
        spool.append([a_draft()])
    assert SpoolLock(path).given == Given(spool.stream, 12)


def test_a_file_that_was_deleted_is_no_loss_of_numbers(path: Path) -> None:
    fill(path, 10)
    path.unlink()
    with Spool(path) as spool:
        assert (spool.recovered, spool.last_seq) == (None, 0)


def test_half_of_the_last_commit_is_what_a_power_cut_leaves(path: Path) -> None:
    with Spool(path) as spool:
        stream = spool.stream
        for number in range(9):
            spool.append([a_draft(number)])
        lock = path.with_name(path.name + ".lock")
        before = lock.read_bytes()
        spool.append([a_draft(9)])
        image = path.parent.with_name("image")
        shutil.copytree(path.parent, image)
    (image / lock.name).write_bytes(before)  # which the tenth had not come to
    journal = image / (path.name + "-wal")
    data = bytearray(journal.read_bytes())
    data[-100] ^= 1
    journal.write_bytes(data)
    with Spool(image / path.name) as spool:
        assert spool.recovered is None
        assert (spool.stream, spool.account().enqueued) == (stream, 9)


def test_the_kept_file_counts_in_the_cap(path: Path) -> None:
    fill(path, 400)
    size = path.stat().st_size
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE account SET enqueued=enqueued+1, pending=pending+1")
    one = len(a_draft(size_bytes=200).body) + ROW_OVERHEAD_BYTES
    max_bytes = 2 * size + 10
    with Spool(path, max_bytes=max_bytes) as spool:
        kept = path.with_name(path.name + ".corrupt")
        assert kept.stat().st_size == size
        spool.append([a_draft(size_bytes=200)] * 1000)
        assert spool.account().pending * one <= max_bytes - size
        assert spool.account().pending * one > max_bytes - size - 2 * one
        assert spool.account().enqueued == 1400


def test_a_damaged_file_that_is_too_large_is_salvaged_and_not_kept(path: Path) -> None:
    fill(path, 400)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE account SET enqueued=enqueued+1, pending=pending+1")
    with Spool(path, max_bytes=path.stat().st_size) as spool:
        assert spool.salvaged == 400
    assert [file.name for file in path.parent.iterdir() if "corrupt" in file.name] == []


VERSION_1 = (
    "PRAGMA journal_mode=WAL",
    "CREATE TABLE rows(seq INTEGER PRIMARY KEY, priority INTEGER NOT NULL, size_bytes INTEGER NOT NULL, "
    "crc INTEGER NOT NULL, body BLOB NOT NULL)",
    "CREATE INDEX droppable ON rows(priority, seq, size_bytes)",
    "CREATE TABLE account(id INTEGER PRIMARY KEY CHECK (id = 1), stream TEXT NOT NULL, clean INTEGER NOT NULL, "
    "next_seq INTEGER NOT NULL, enqueued INTEGER NOT NULL, delivered INTEGER NOT NULL, pending INTEGER NOT NULL, "
    "dropped INTEGER NOT NULL, pending_bytes INTEGER NOT NULL, CHECK (enqueued = delivered + pending + dropped))",
    f"PRAGMA application_id={0x4F755472}",
    "PRAGMA user_version=1",
)


def write_version_1(path: Path, *, clean: bool) -> str:
    """A spool as version 1 of its schema had it: 5 records pending out of 9."""
    path.parent.mkdir()
    stream = str(uuid.uuid4())
    bodies = [a_draft(number).body for number in range(5)]
    sizes = [len(body) + ROW_OVERHEAD_BYTES for body in bodies]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in VERSION_1:
            db.execute(statement).fetchall()
        db.execute("INSERT INTO account VALUES (1,?,?,10,9,3,5,1,?)", (stream, clean, sum(sizes)))
        for seq, (body, size) in enumerate(zip(bodies, sizes, strict=True), 5):
            db.execute("INSERT INTO rows VALUES (?,?,?,?,?)", (seq, LOW, size, zlib.crc32(body), body))
    return stream


@pytest.mark.parametrize("clean", [True, False])
def test_a_spool_of_version_1_goes_on(path: Path, clean: bool) -> None:
    stream = write_version_1(path, clean=clean)
    for opened in range(2):
        with Spool(path, max_age_s=3600.0) as spool:
            assert (spool.stream, spool.recovered) == (stream, None)
            assert spool.account() == Account(enqueued=9, delivered=3, pending=5, dropped=1)
            assert [row.seq for row in spool.peek(99)] == [5, 6, 7, 8, 9]
            assert spool.last_seq == (9 if clean else 10)
            assert spool.expire() == 0, "what came from version 1 has its age from now on"
            if opened:
                assert spool.receive([Range(5, 9)]) == 5
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_migration_that_is_cut_short_is_begun_again(path: Path) -> None:
    write_version_1(path, clean=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("ALTER TABLE rows ADD COLUMN lived_ms INTEGER NOT NULL DEFAULT 0")
        db.execute("ROLLBACK")
    with Spool(path) as spool:
        assert spool.account().pending == 5


def test_a_version_that_never_was_is_no_spool(path: Path) -> None:
    write_version_1(path, clean=True)
    with path.open("r+b") as file:  # the user version stands in bytes 60 to 63 of the header
        file.seek(60)
        file.write(struct.pack(">i", -7))
    with Spool(path) as spool:
        assert "not a spool" in str(spool.recovered)
