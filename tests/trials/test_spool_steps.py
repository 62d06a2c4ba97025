"""Kill -9 at every step of a spool's recovery, expiry and claim; and an older quarantined file on a full disk.

A share of each count always runs; the full one with ``make trials``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry.spool import Account, Spool
from support.spool_stepper import BOOT, CLAIMED, DAMAGED, POISONED, RECEIVED, RECORDS
from support.telemetry import a_draft
from support.telemetry_trials import record_trial
from support.tmpfs import fill, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TESTS = Path(__file__).parents[1]
BODIES = [a_draft(number).body for number in range(RECORDS)]


def write(path: Path) -> None:
    with Spool(path, clock=lambda: 0.0, boot=BOOT) as spool:
        spool.append([a_draft(number) for number in range(RECORDS)])


def change(path: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(sql)


def damage_account(path: Path) -> None:
    """As a flipped bit would: the account does not add up with the rows."""
    write(path)
    change(path, "UPDATE account SET clean=0, enqueued=enqueued+1, pending=pending+1")


def damage_rows(path: Path) -> None:
    write(path)
    change(path, f"UPDATE rows SET crc=crc+1 WHERE seq IN {DAMAGED}")


def check_recovered(path: Path, spool: Spool) -> None:
    """Every record, and nothing that the recovery left about."""
    assert [row.body for row in spool.peek(10**6)] == BODIES
    assert not [file.name for file in path.parent.iterdir() if "damaged" in file.name or "fresh" in file.name]


def check_expired(_: Path, spool: Spool) -> None:
    """All that were not in flight, or none."""
    account, seqs = spool.account(), [row.seq for row in spool.peek(10**6)]
    assert seqs in ([*range(1, RECORDS + 1)], [*range(1, CLAIMED + 1)])
    assert account.expired == account.dropped == RECORDS - len(seqs)


def check_claimed(_: Path, spool: Spool) -> None:
    """The three changes happened in this order, each whole or not at all."""
    account, seqs = spool.account(), {row.seq for row in spool.peek(10**6)}
    left, states = set(range(1, RECORDS + 1)), []
    states.append((set(left), 0, 0, 0))
    left -= set(DAMAGED)
    states.append((set(left), len(DAMAGED), 0, 0))
    left.discard(POISONED)
    states.append((set(left), len(DAMAGED), 1, 0))
    left -= set(range(RECEIVED.first, RECEIVED.last + 1))
    states.append((left | {max(seqs)}, len(DAMAGED), 1, 2))
    assert (seqs, account.damaged, account.poisoned, account.delivered) in states


JOBS: dict[str, tuple[Callable[[Path], None], Callable[[Path, Spool], None]]] = {
    "recover": (damage_account, check_recovered),
    "expire": (write, check_expired),
    "claim": (damage_rows, check_claimed),
}


def kill_at(path: Path, job: str, at: int) -> tuple[str, bool]:
    """Kill -9 one that does a job before its ``at``-th step. Gives that step, and whether it came to it."""
    done = subprocess.run(
        [sys.executable, "-m", "support.spool_stepper", str(path), job, str(at)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    steps = done.stdout.splitlines()
    assert len(steps) == at or done.returncode == 0
    return steps[-1], done.returncode != 0


def check_account(account: Account) -> None:
    assert account.enqueued == account.delivered + account.pending + account.dropped
    assert account.dropped == account.expired + account.poisoned + account.damaged


def kill_at_steps(tmp_path: Path, *, every: Mapping[str, int]) -> dict[str, Any]:
    """Kill at every ``every[job]``-th step of each job, from its beginning to its end."""
    found: dict[str, Any] = {}
    for job, (prepare, check) in JOBS.items():
        steps: list[str] = []
        at, came = 1, True
        while came:
            path = tmp_path / f"{job}-{at}" / "x.sqlite"
            prepare(path)
            step, came = kill_at(path, job, at)
            steps += [step] * came
            with Spool(path, boot=BOOT) as spool:
                account = spool.account()
                check_account(account)
                assert account.pending == len(spool.peek(10**6))
                check(path, spool)
                spool.append([a_draft()])
            at += every[job]
        assert len(steps) >= 5
        found[job] = {"kills": len(steps), "before": sorted(set(steps)), "lost": 0}
    return found


def test_kill_9_at_steps_of_recovery_expiry_and_claim_a_share(tmp_path: Path) -> None:
    kill_at_steps(tmp_path, every={"recover": 12, "expire": 5, "claim": 7})


@pytest.mark.trials
def test_kill_9_at_every_step_of_recovery_expiry_and_claim(tmp_path: Path) -> None:
    record_trial("steps", lambda: kill_at_steps(tmp_path, every=dict.fromkeys(JOBS, 1)))


def test_an_older_quarantined_file_gives_way_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=2048) as disk:
        path, older = disk / "x.sqlite", disk / "x.sqlite.corrupt"
        damage_account(path)
        older.write_bytes(b"older" * 100_000)
        fill(disk)
        with Spool(path) as spool:
            assert spool.recovered is not None
            check_recovered(path, spool)
            assert spool.append([a_draft()])
        assert not older.exists() or b"older" not in older.read_bytes()
