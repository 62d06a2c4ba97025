"""What is on its way out of a spool, while the spool goes on: read without waiting, held while it is under way."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.telemetry.claims import Claims
from outrider.telemetry.record import Range, Row
from outrider.telemetry.spool import LOW, Draft, Spool
from outrider.telemetry.writer import Settings, World, Writer
from outrider_runtimes.heat import read_heat
from support.broker import wait_until
from support.telemetry import a_draft

FOREVER_S = 3600.0

Made = tuple[Writer, Spool, list[str]]  # and its commits


class Meanwhile(list[Draft]):
    """Drafts of a commit in whose transaction something else is done."""

    def __iter__(self) -> Iterator[Draft]:
        thread = threading.Thread(target=self.claim)
        thread.start()
        thread.join(120.0)
        self.waited = thread.is_alive()
        return super().__iter__()

    def claim(self) -> None:
        self.claimed = [row.seq for row in self.spool.claim(9, after_seq=0, max_bytes=10**6)]

    def __init__(self, spool: Spool, drafts: list[Draft]) -> None:
        super().__init__(drafts)
        self.spool = spool


def test_a_claim_does_not_wait_for_a_commit(tmp_path: Path) -> None:
    with Spool(tmp_path / "x.sqlite") as spool:
        spool.append([a_draft()] * 3)
        drafts = Meanwhile(spool, [a_draft()])
        spool.append(drafts)
        assert not drafts.waited
        assert drafts.claimed == [1, 2, 3], "what is not committed is not there"
        assert [row.seq for row in spool.claim(9, after_seq=3, max_bytes=10**6)] == [4]


def test_what_a_commit_drops_is_never_in_flight_and_what_is_in_flight_is_never_dropped(tmp_path: Path) -> None:
    draft = Draft(body=b'{"a":"' + b"x" * 200 + b'"}', priority=LOW)
    with Spool(tmp_path / "x.sqlite", max_bytes=40 * (len(draft.body) + 64)) as spool:
        spool.append([draft] * 47)  # seven are dropped before anyone reads, however quick the reader is later
        ended = threading.Event()

        def write() -> None:
            for _ in range(150):
                spool.append([draft] * 7)
            ended.set()

        writer = threading.Thread(target=write)
        writer.start()
        cursor, rounds = 0, 0
        while not ended.is_set() or rounds < 3:
            held = [row.seq for row in spool.claim(15, after_seq=cursor, max_bytes=10**6)]
            there = {row.seq for row in spool.peek(10**6)}
            assert there.issuperset(held)
            rounds += 1
            if held:
                cursor = held[-1]
                spool.receive([Range(held[0], held[-1])])
        writer.join()
        account = spool.account()
        assert account.enqueued == 47 + 150 * 7 == account.delivered + account.pending + account.dropped
        assert account.dropped > 0 and account.delivered > 0


class Overtaken(Claims):
    """Whose first reading is overtaken by a drop."""

    def __init__(self, path: Path, drop: Callable[[], object]) -> None:
        super().__init__(path)
        self.drop, self.readings = drop, 0

    def _read(self, limit: int, after_seq: int, max_bytes: int) -> tuple[list[Row], list[int]]:
        found = super()._read(limit, after_seq, max_bytes)
        self.readings += 1
        if self.readings == 1:
            with self.dropping() as held:
                assert not held
                self.drop()
        return found


def test_what_was_read_before_a_drop_is_read_again(tmp_path: Path) -> None:
    with Spool(tmp_path / "x.sqlite") as spool:
        spool.append([a_draft()] * 3)
        claims = Overtaken(spool.path, lambda: spool.receive([Range(2, 2)]))
        rows, bad = claims.take(9, after_seq=0, max_bytes=10**6)
        assert [row.seq for row in rows] == [1, 3] and not bad
        assert claims.readings == 2
        claims.close()
        with pytest.raises(sqlite3.Error, match="closed"):
            claims.take(9, after_seq=0, max_bytes=10**6)


def test_a_record_that_was_delivered_costs_no_page_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    body = b'{"a":"' + b"x" * 600 + b'"}'
    with Spool(path) as spool:
        spool.append([Draft(body=body, priority=LOW)] * 300)
    with Spool(path) as spool:
        journal = path.with_name(path.name + "-wal")
        before = journal.stat().st_size
        spool.receive([Range(1, 300)])
        assert journal.stat().st_size - before < 0.75 * 300 * len(body)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Made]:
    commits: list[str] = []
    with Spool(tmp_path / "x.sqlite") as spool:
        spool.append([a_draft()] * 60)
        spool._db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
        settings = Settings(commit_interval_s=FOREVER_S, queue_size=9, sample=1.0, metrics_interval_s=None)
        world = World(
            clock=lambda: 1.0, wall_clock=lambda: 1.0, synchronised=lambda: True, heat=read_heat, rng=random.Random(0)
        )
        made = Writer(
            lambda: spool,
            name="x",
            boot_id="0b7c1f56-3f7e-4a58-9d6c-2a1e5f40c3d2",
            settings=settings,
            world=world,
            committed=lambda: None,
            summarized=lambda _: None,
        )
        made.open()
        made.start()
        try:
            yield made, spool, commits
        finally:
            made.close()


def test_receipts_are_committed_together_when_all_that_is_awaited_has_come(writer: Made) -> None:
    made, spool, commits = writer
    done: list[bool] = []
    flush = threading.Thread(
        target=lambda: done.append(made.flush(60.0, lambda seq: spool.oldest_seq() > seq, tick_s=0.01))
    )
    flush.start()
    for seq in range(1, 61):
        made.received((Range(seq, seq),), through=seq)
    flush.join()
    assert done == [True]
    assert spool.account().delivered == 60
    assert len(commits) <= 2, "of the sixty receipts none is a commit of its own"


def test_receipts_that_came_before_anyone_waits_are_committed_at_once(writer: Made) -> None:
    made, spool, commits = writer
    for seq in range(1, 61):
        made.received((Range(seq, seq),), through=seq)
    assert spool.account().delivered == 0 and not commits
    assert made.flush(60.0, lambda seq: spool.oldest_seq() > seq, tick_s=0.01)
    assert spool.account().delivered == 60 and len(commits) == 1


def test_receipts_for_many_records_wait_for_nobody(writer: Made) -> None:
    made, spool, commits = writer
    spool.append([a_draft()] * 4096)
    before = len(commits)
    made.received((Range(1, 4095),), through=4095)
    assert len(commits) == before
    made.received((Range(4096, 4096),), through=4096)
    wait_until(lambda: spool.account().delivered == 4096)
    assert len(commits) == before + 1


def test_receipts_are_committed_at_the_end(writer: Made) -> None:
    made, spool, _ = writer
    made.received((Range(1, 30),), through=30)
    made.close()
    assert spool.account().delivered == 30
