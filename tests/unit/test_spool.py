"""The spool: its account holds after anything, its numbers rise for ever, and what is on its disk may be anything."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.telemetry.record import Range
from outrider.telemetry.spool import HIGH, LOW, NORMAL, ROW_OVERHEAD_BYTES, Account, Draft, Spool
from outrider.telemetry.spoolfile import delete_dropped
from outrider_runtimes.errors import TelemetryError
from support.effort import effort
from support.telemetry import a_draft
from support.tmpfs import fill
from support.tmpfs import small_disk as tmpfs_of

TESTS = Path(__file__).parents[1]


# Thousands of commits: what they wait for a disk says nothing here.
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry" / "pi-07.sqlite"


def is_exact(spool: Spool) -> bool:
    """Whether the account adds up and its pending records are there."""
    account = spool.account()
    adds_up = account.enqueued == account.delivered + account.pending + account.dropped
    return adds_up and account.pending == len(spool.peek(10**9))


class AnySequence(RuleBasedStateMachine):
    """Whatever is done to a spool, crashes among it, it is what a dictionary would be."""

    MAX_BYTES = 3000

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="spool-", dir=IN_MEMORY))
        self.crashes = 0
        self.spool = Spool(self.folder / "0" / "x.sqlite", max_bytes=self.MAX_BYTES)
        self.pending: dict[int, Draft] = {}
        self.held: set[int] = set()
        self.last_seq = self.enqueued = self.delivered = self.dropped = 0

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)

    def _expect_drops(self) -> None:
        excess = sum(len(draft.body) + ROW_OVERHEAD_BYTES for draft in self.pending.values()) - self.MAX_BYTES
        for seq in sorted(self.pending, key=lambda seq: (self.pending[seq].priority, seq)):
            if excess <= 0:
                break
            if seq not in self.held:
                excess -= len(self.pending.pop(seq).body) + ROW_OVERHEAD_BYTES
                self.dropped += 1

    @rule(
        sizes=st.lists(st.integers(0, 900), max_size=6),
        priorities=st.lists(st.sampled_from([LOW, NORMAL, HIGH]), min_size=6, max_size=6),
        lost=st.integers(0, 3),
        first=st.integers(1, 40),
        count=st.integers(0, 10),
    )
    def commit(self, sizes: list[int], priorities: list[int], lost: int, first: int, count: int) -> None:
        drafts = [a_draft(size_bytes=size, priority=priorities[at]) for at, size in enumerate(sizes)]
        ranges = [Range(first, first + count - 1)] if count else []
        committed = self.spool.commit(drafts, lost=lost, ranges=ranges)
        done = [seq for seq in self.pending if first <= seq < first + count]
        assert committed.delivered == len(done)
        assert committed.seqs == tuple(range(self.last_seq + 1, self.last_seq + 1 + len(drafts)))
        for seq in done:
            del self.pending[seq]
            self.held.discard(seq)
        self.delivered += len(done)
        self.enqueued += len(drafts)
        self.pending.update(zip(committed.seqs, drafts, strict=True))
        self.last_seq += len(drafts) + lost
        if drafts:
            self._expect_drops()

    @rule(limit=st.integers(1, 4), after=st.integers(0, 30))
    def claim(self, limit: int, after: int) -> None:
        rows = self.spool.claim(limit, after_seq=after, max_bytes=10**6)
        assert [row.seq for row in rows] == sorted(seq for seq in self.pending if seq > after)[:limit]
        self.held.update(row.seq for row in rows)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.held)))
        self.spool.release([seq])
        self.held.discard(seq)

    @rule(clean=st.booleans())
    def stop_and_start(self, clean: bool) -> None:
        old, path = self.spool, self.spool.path
        if not clean:
            self.crashes += 1
            path = self.folder / str(self.crashes) / "x.sqlite"
            # What a power cut leaves: the files as they are now, and nobody who could tidy them up.
            shutil.copytree(old.path.parent, path.parent)
            self.last_seq += 1
        old.close()
        self.spool = Spool(path, max_bytes=self.MAX_BYTES)
        assert self.spool.stream == old.stream
        assert self.spool.recovered is None
        self.held.clear()

    @invariant()
    def is_as_expected(self) -> None:
        assert self.spool.account() == Account(
            enqueued=self.enqueued, delivered=self.delivered, pending=len(self.pending), dropped=self.dropped
        )
        assert self.spool.last_seq == self.last_seq
        assert self.spool.oldest_seq() == min(self.pending, default=self.last_seq + 1)
        assert [(row.seq, row.body) for row in self.spool.peek(1000)] == [
            (seq, self.pending[seq].body) for seq in sorted(self.pending)
        ]


AnySequence.TestCase.settings = settings(max_examples=effort(30), stateful_step_count=25, deadline=None)
TestAnySequence = AnySequence.TestCase


def test_numbers_go_on_after_a_clean_stop_without_a_gap(path: Path) -> None:
    with Spool(path) as spool:
        stream = spool.stream
        assert spool.append([a_draft()] * 3) == (1, 2, 3)
    with Spool(path) as spool:
        assert spool.stream == stream
        assert spool.append([a_draft()]) == (4,)


def test_what_was_lost_is_a_gap_after_what_was_not(path: Path) -> None:
    with Spool(path) as spool:
        assert spool.append([a_draft()], lost=5) == (1,)
    with Spool(path) as spool:
        assert spool.append([a_draft()]) == (7,)


def test_a_second_receipt_changes_nothing(path: Path) -> None:
    with Spool(path) as spool:
        spool.append([a_draft()] * 10)
        assert spool.receive([Range(2, 4), Range(4, 6)]) == 5
        assert spool.receive([Range(2, 6)]) == 0
        assert spool.receive([Range(1000, 2000)]) == 0
        assert spool.account() == Account(enqueued=10, delivered=5, pending=5, dropped=0)
        assert [row.seq for row in spool.peek(100)] == [1, 7, 8, 9, 10]
        assert [row.seq for row in spool.peek(2, after_seq=7)] == [8, 9]


def test_the_lowest_priority_goes_first_then_the_oldest_and_what_is_in_flight_stays(path: Path) -> None:
    size = len(a_draft().body) + ROW_OVERHEAD_BYTES
    with Spool(path, max_bytes=4 * size) as spool:
        spool.append([a_draft(priority=priority) for priority in (HIGH, LOW, LOW, NORMAL)])
        assert [row.seq for row in spool.claim(2, after_seq=0, max_bytes=10**6)] == [1, 2]
        spool.append([a_draft(priority=NORMAL)])
        assert [row.seq for row in spool.peek(9)] == [1, 2, 4, 5]
        spool.append([a_draft(priority=LOW)])
        assert [row.seq for row in spool.peek(9)] == [1, 2, 4, 5], "a new record of the lowest class goes itself"
        spool.release([1, 2])
        spool.append([a_draft(priority=HIGH)])
        assert [row.seq for row in spool.peek(9)] == [1, 4, 5, 7]
        assert spool.account() == Account(enqueued=7, delivered=0, pending=4, dropped=3)


def test_a_claim_is_bounded_by_bytes_and_gives_one_at_least(path: Path) -> None:
    with Spool(path) as spool:
        spool.append([a_draft(size_bytes=500)] * 5)
        size = len(spool.peek(1)[0].body)
        assert len(spool.claim(9, after_seq=0, max_bytes=1)) == 1
        assert len(spool.claim(9, after_seq=0, max_bytes=3 * size)) == 3


def test_the_file_stays_within_its_bound_and_a_little(path: Path) -> None:
    with Spool(path, max_bytes=1_000_000) as spool:
        for _ in range(60):
            spool.append([a_draft(size_bytes=300)] * 500)
        assert is_exact(spool)
        assert 0 < spool.account().pending < 3000
        size_bytes = sum(file.stat().st_size for file in path.parent.iterdir())
    assert size_bytes < 1_000_000 * 1.3 + 6 * 1024 * 1024


def test_one_process_at_a_time_and_the_holder_is_named(path: Path) -> None:
    with Spool(path), pytest.raises(TelemetryError, match=f"in use by process {os.getpid()}") as caught:
        Spool(path)
    assert caught.value.hint
    Spool(path).close()


def test_two_threads_append_and_none_of_their_records_is_lost(path: Path) -> None:
    with Spool(path) as spool:
        threads = [
            threading.Thread(target=lambda: [spool.append([a_draft()] * 3) for _ in range(30)]) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert spool.account().enqueued == 180
        assert [row.seq for row in spool.peek(1000)] == list(range(1, 181))


def test_a_closed_spool_says_so(path: Path) -> None:
    spool = Spool(path)
    spool.close()
    spool.close()
    for use in (lambda: spool.append([a_draft()]), lambda: spool.peek(1), spool.account):
        with pytest.raises(TelemetryError, match="closed"):
            use()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TelemetryError, match=str(tmp_path / "file")) as caught:
        Spool(tmp_path / "file" / "telemetry" / "x.sqlite")
    assert "state=" in caught.value.hint


def test_a_spool_of_a_newer_version_is_left_alone(path: Path) -> None:
    Spool(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=3")
    before = path.read_bytes()
    with pytest.raises(TelemetryError, match="newer version"):
        Spool(path)
    assert path.read_bytes() == before


def corrupt_header(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 400)


def corrupt_foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs(x)")


def corrupt_account(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE account SET enqueued=enqueued+1, pending=pending+1")


def corrupt_no_account(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TABLE account")


def corrupt_cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5000)


@pytest.mark.parametrize(
    ("corrupt", "salvaged"),
    [(corrupt_header, 0), (corrupt_foreign, 0), (corrupt_account, 40), (corrupt_no_account, 40), (corrupt_cut, 0)],
)
def test_a_corrupt_file_is_set_aside_and_a_fresh_stream_begins(path: Path, corrupt, salvaged: int, caplog) -> None:
    for _ in range(2):  # the second one takes the place of the first
        with Spool(path) as spool:
            stream = spool.stream
            spool.append([a_draft(size_bytes=300)] * 40)
        corrupt(path)
        found = path.read_bytes()
        caplog.clear()
        with Spool(path) as spool:
            assert spool.recovered
            assert spool.stream != stream
            assert spool.salvaged == salvaged
            assert spool.account() == Account(enqueued=salvaged, delivered=0, pending=salvaged, dropped=0)
            assert spool.append([a_draft()]) == (salvaged + 1,)
        kept = path.with_name(path.name + ".corrupt")
        assert str(kept) in caplog.text
        assert kept.read_bytes() == found
        assert not [file.name for file in path.parent.iterdir() if file.name.count("corrupt") > 1]
        path.unlink()


def test_an_empty_file_is_a_spool_that_was_not_made_yet(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with Spool(path) as spool:
        assert spool.recovered is None
        assert spool.append([a_draft()]) == (1,)


def check_flips(path: Path, *, seeds: range) -> None:
    """After any change of any bytes a spool opens, or says why not, and its account is exact."""
    with Spool(path) as spool:
        spool.append([a_draft(size_bytes=300)] * 60)
        spool.receive([Range(5, 9)])
        # As a crash leaves it: the last commits in the journal.
        image = path.parent.with_name("image")
        shutil.copytree(path.parent, image)
    for seed in seeds:
        rng = random.Random(seed)
        folder = path.parent.with_name(f"flip-{seed}")
        shutil.copytree(image, folder)
        victim = folder / (path.name + rng.choice(["", "-wal"]))
        data = bytearray(victim.read_bytes())
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 8, 64))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        with Spool(folder / path.name) as spool:
            rows = spool.claim(100, after_seq=0, max_bytes=10**6)
            assert is_exact(spool), seed
            assert all(row.body == a_draft(size_bytes=300).body for row in rows), seed
            spool.append([a_draft()])
            assert is_exact(spool), seed


def test_flipped_and_cut_bytes_in_the_file_and_its_journal(path: Path) -> None:
    check_flips(path, seeds=range(40))


def test_a_record_whose_bytes_changed_on_disk_is_dropped_and_counted(path: Path, caplog) -> None:
    with Spool(path) as spool:
        spool.append([a_draft()] * 5)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE rows SET body=CAST(replace(CAST(body AS TEXT), 'number', 'nvmber') AS BLOB) WHERE seq=3")
    with Spool(path) as spool:
        assert [row.seq for row in spool.claim(9, after_seq=0, max_bytes=10**6)] == [1, 2, 4, 5]
        assert spool.account() == Account(enqueued=5, delivered=0, pending=4, dropped=1, damaged=1)
    assert "checksum" in caplog.text


def test_what_left_before_it_could_be_dropped_is_not_counted_twice(path: Path) -> None:
    with Spool(path) as spool:
        spool.append([a_draft()] * 3)
        assert spool.receive([Range(2, 2)]) == 1
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        delete_dropped(db, [1, 2, 9], why="damaged")
        query = "SELECT enqueued, delivered, pending, dropped, damaged, pending_bytes FROM account"
        *account, pending_bytes = db.execute(query).fetchone()
        assert account == [3, 1, 1, 1, 1]
        assert db.execute("SELECT count(*), sum(size_bytes) FROM rows").fetchone() == (1, pending_bytes)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs_of(tmp_path / "disk", size_kib=512) as folder:
        yield folder


def test_a_full_disk_is_an_error_that_changes_nothing(small_disk: Path) -> None:
    with Spool(small_disk / "x.sqlite") as spool:
        spool.append([a_draft(size_bytes=300)] * 50)
        ballast = fill(small_disk)
        refused = 0
        for _ in range(20):
            before, last_seq = spool.account(), spool.last_seq
            try:
                spool.append([a_draft(size_bytes=300)] * 200, lost=1)
            except TelemetryError as error:
                refused += 1
                assert "full" in str(error) or "I/O" in str(error)
                assert (spool.account(), spool.last_seq) == (before, last_seq)
        assert refused
        assert is_exact(spool)
        ballast.unlink()
        last_seq = spool.last_seq
        assert spool.append([a_draft()]) == (last_seq + 1,)
    with Spool(small_disk / "x.sqlite") as spool:
        assert spool.recovered is None
        assert is_exact(spool)


def test_a_spool_cannot_be_made_on_a_full_disk(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(TelemetryError) as caught:
        Spool(small_disk / "telemetry" / "x.sqlite")
    assert caught.value.hint
