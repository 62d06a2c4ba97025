"""A spool's writer is killed: what it said was committed is there, number by number, and the account is exact."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from outrider.telemetry.spool import Spool
from support.spool_steps import STEPS
from support.telemetry_trials import record_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TESTS = Path(__file__).parents[1]
NEVER_REACHED, SOON_REACHED = 1 << 30, 200_000  # byte caps
LIVES = 10  # of one spool


@dataclass(kw_only=True)
class Kept:
    """One spool over its writers' lives: what they said, and whether it is there.

    Attributes:
        last_seq: the highest number after the last life.
        bodies: by number, the checksum of each record that was acknowledged.
        received: the numbers that receipts named, of a commit that may not have come to its end too.
    """

    path: Path
    max_bytes: int
    last_seq: int = 0
    bodies: dict[int, int] = field(default_factory=dict)
    received: set[int] = field(default_factory=set)

    def live(self, *, seed: int, step: str = "", times: int = 1) -> int:
        """A writer that is killed, at a step or at some moment; then everything is looked at. Gives its commits."""
        said = kill_a_writer(self.path, self.max_bytes, seed=seed, step=step, times=times)
        for word, numbers in said:
            if word == "receive":
                self.received.update(range(numbers[0], numbers[1] + 1))
            elif word == "bodies":
                self.bodies.update(zip(count(numbers[0]), numbers[1:], strict=False))
        with Spool(self.path, max_bytes=self.max_bytes) as spool:
            self._check_account(spool, said)
            self._check_rows(spool)
            self.last_seq = spool.last_seq
        return sum(word == "done" for word, _ in said)

    def _check_account(self, spool: Spool, said: list[tuple[str, list[int]]]) -> None:
        assert spool.recovered is None
        account = spool.account()
        assert account.enqueued == account.delivered + account.pending + account.dropped
        assert account.pending == len(spool.peek(10**9))
        assert spool.last_seq >= self.last_seq
        opened = [numbers[0] for word, numbers in said if word == "open"]
        assert all(first >= self.last_seq for first in opened), "numbers go on after those of the life before"
        done = [numbers for word, numbers in said if word == "done"]
        if done:
            last_seq, *counters = done[-1]
            now = (account.enqueued, account.delivered, account.dropped)
            assert all(new >= old for new, old in zip(now, counters, strict=True))
            assert spool.last_seq > last_seq, "one number at least is burnt"

    def _check_rows(self, spool: Spool) -> None:
        there = {row.seq: crc32(row.body) for row in spool.peek(10**9)}
        missing = self.bodies.keys() - there.keys() - self.received
        dropped = spool.account().dropped
        assert len(missing) <= dropped
        if self.max_bytes == NEVER_REACHED:
            assert dropped == 0
        assert all(self.bodies.get(seq, crc) == crc for seq, crc in there.items())


def kill_a_writer(path: Path, max_bytes: int, *, seed: int, step: str, times: int) -> list[tuple[str, list[int]]]:
    """What it said until it was killed; its last line counts only where it is whole."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "support.spool_writer", str(path), str(max_bytes), str(seed)]
    command += [step, str(times)] if step else []
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        lines = []
        if not step:
            lines = [child.stdout.readline() for _ in range(1 + rng.randrange(120))]
            for _ in range(rng.randrange(20_000)):  # it goes on: where in its next commits the kill finds it is chance
                pass
            child.kill()
        lines += child.stdout.readlines()
        child.wait()
    assert child.returncode == -signal.SIGKILL, f"it never came to {step!r}"
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(word, [int(number) for number in numbers]) for word, *numbers in words]


def kill_writers(path: Path, *, at_random: int, per_step: int) -> dict[str, Any]:
    def another(max_bytes: int) -> Kept:
        shutil.rmtree(path.parent, ignore_errors=True)
        return Kept(path=path, max_bytes=max_bytes)

    acknowledged = records = 0
    for first in range(0, at_random, LIVES):
        kept = another(SOON_REACHED if first // LIVES % 2 else NEVER_REACHED)
        for seed in range(first, min(first + LIVES, at_random)):
            acknowledged += kept.live(seed=seed)
        records += len(kept.bodies)
    for step, where in STEPS.items():
        kept = another(SOON_REACHED)
        for times in range(1, per_step + 1):
            if where == "new":
                kept = another(SOON_REACHED)
            elif where == "open":
                kept.live(seed=1000 + times)  # there is something else to open each time
            kept.live(seed=times, step=step, times=times if where == "commit" else 1)
        records += len(kept.bodies)
    return {
        "kills": at_random + per_step * sum(1 + (where == "open") for where in STEPS.values()),
        "at_random": at_random,
        "at_each_of": list(STEPS),
        "commits": acknowledged,
        "records": records,
        "lost": 0,
    }


def test_kill_9_of_the_writer_a_share(tmp_path: Path) -> None:
    kill_writers(tmp_path / "spool" / "x.sqlite", at_random=14, per_step=1)


@pytest.mark.trials
def test_kill_9_of_the_writer_300_times_and_at_every_step(tmp_path: Path) -> None:
    record_trial("writer", lambda: kill_writers(tmp_path / "spool" / "x.sqlite", at_random=300, per_step=10))
