"""Writes to a spool until it is killed; says on stdout what is committed.

Arguments: the spool's path, a seed, and of one that kills itself: the beginning of the SQL statement before which it
does so, and at which of these. The step ``after commit`` is when a commit has returned, before that is said.
"""

from __future__ import annotations

import os
import random
import signal
import sys

from outrider.telemetry.record import Range
from outrider.telemetry.spool import HIGH, LOW, LOWEST, NORMAL, Spool
from support.spool_steps import AFTER_COMMIT
from support.statements import watch_statements
from support.telemetry import a_draft


class Killer:
    """Ends this process at a step, as a power cut would: nothing of it runs afterwards."""

    def __init__(self, step: str, times: int) -> None:
        self.step, self.left = step, times

    def statement(self, sql: str) -> None:
        if sql.startswith(self.step):
            self.here()

    def here(self) -> None:
        self.left -= 1
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    path, seed = sys.argv[1], int(sys.argv[2])
    killer = Killer(*(sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("never", 1))
    watch_statements(killer.statement)
    rng = random.Random(seed)
    with Spool(path, max_bytes=200_000) as spool:
        print("open", spool.last_seq, flush=True)
        while True:
            drafts = [
                a_draft(size_bytes=rng.randrange(400), priority=rng.choice((LOWEST, LOW, NORMAL, HIGH)))
                for _ in range(rng.randrange(1, 40))
            ]
            low = max(1, spool.last_seq - rng.randrange(200))
            spool.commit(drafts, lost=rng.randrange(3), ranges=[Range(low, low + rng.randrange(30))])
            if killer.step == AFTER_COMMIT:
                killer.here()
            account = spool.account()
            print("done", spool.last_seq, account.enqueued, account.delivered, account.dropped, flush=True)


main()
