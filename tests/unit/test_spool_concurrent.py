"""The spool under everything at once: its account is exact to who looks from outside, and what is in flight stays."""

from __future__ import annotations

import random
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.telemetry.record import Range, to_ranges
from outrider.telemetry.spool import HIGH, LOW, LOWEST, NORMAL, Account, Spool
from support.clocks import ManualClock
from support.telemetry import a_draft

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
COUNTERS = ("enqueued", "delivered", "pending", "dropped", "expired", "poisoned", "damaged")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spool-", dir=IN_MEMORY) as name:
        yield Path(name)


class Onlooker:
    """Looks at the file over a connection of its own: each look is one state between two transactions."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.looks: list[Account] = []

    def look(self) -> None:
        self._db.execute("BEGIN")
        found = self._db.execute(f"SELECT {', '.join(COUNTERS)}, pending_bytes, next_seq FROM account").fetchone()
        rows = self._db.execute("SELECT count(*), coalesce(sum(size_bytes), 0), max(seq) FROM rows").fetchone()
        self._db.execute("COMMIT")
        account = Account(**dict(zip(COUNTERS, found, strict=False)))
        assert account.enqueued == account.delivered + account.pending + account.dropped
        assert account.expired + account.poisoned + account.damaged <= account.dropped
        assert (rows[0], rows[1]) == (account.pending, found[-2])
        assert (rows[2] or 0) < found[-1]
        if self.looks:
            before = self.looks[-1]
            assert all(getattr(account, name) >= getattr(before, name) for name in COUNTERS if name != "pending")
        self.looks.append(account)


def all_together(*works: Callable[[], None]) -> None:
    """Each on a thread of its own; what one raises is raised here."""
    failed: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_the_account_is_exact_at_every_look_and_what_is_in_flight_stays(folder: Path) -> None:
    rounds = 120
    clock, done, together = ManualClock(), threading.Event(), threading.Barrier(2)
    offered, delivered, poisoned = [], [], []
    with Spool(folder / "x.sqlite", max_bytes=12_000, max_age_s=40.0, clock=clock, boot="one") as spool:
        onlooker = Onlooker(spool.path)

        def offer() -> None:
            rng = random.Random(1)
            try:
                for _ in range(rounds):
                    together.wait(200)
                    clock.now_s += rng.random() * 4.0
                    classes = rng.choices((LOWEST, LOW, NORMAL, HIGH), k=rng.randrange(8))
                    drafts = [a_draft(size_bytes=rng.randrange(300), priority=each) for each in classes]
                    offered.extend(spool.commit(drafts, lost=rng.randrange(3)).seqs)
                    spool.expire()
            finally:
                done.set()

        def take() -> None:
            rng, cursor = random.Random(2), 0
            for _ in range(rounds):
                together.wait(200)
                rows = spool.claim(rng.randrange(1, 4), after_seq=cursor, max_bytes=2000)
                seqs = [row.seq for row in rows]
                for _ in range(3):
                    assert set(seqs) <= {row.seq for row in spool.peek(10**6)}, "what is in flight stays"
                bad, back = seqs[:1] if rng.random() < 0.3 else [], seqs[-1:] if rng.random() < 0.3 else []
                poisoned.extend(seq for seq in bad if spool.set_aside(seq))
                spool.release(back)
                ranges = to_ranges(seq for seq in seqs if seq not in {*bad, *back})
                delivered.append(spool.receive([*ranges, Range(10**9, 10**9 + 5)]))
                assert spool.receive(ranges) == 0, "the same receipt again"
                cursor = 0 if rng.random() < 0.2 else max(seqs, default=0)

        def watch() -> None:
            while not done.is_set():
                onlooker.look()

        all_together(offer, take, watch)
        onlooker.look()
        account = spool.account()
        assert account == onlooker.looks[-1]
        pending = {row.seq for row in spool.peek(10**6)}
        assert (account.enqueued, account.delivered) == (len(offered), sum(delivered))
        assert (account.poisoned, account.damaged) == (len(poisoned), 0)
        assert pending <= set(offered) and not pending & set(poisoned)
        assert min(account.delivered, account.expired, account.poisoned) > 0
        assert account.dropped > account.expired + account.poisoned, "and some had no room"
    with Spool(folder / "x.sqlite", clock=clock, boot="one") as again:
        assert again.recovered is None
        assert again.account() == account
