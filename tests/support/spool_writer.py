"""Writes to a spool until it is killed; says on stdout what it is about to do, and what is committed.

Arguments: the spool's path, its byte cap, a seed, and of one that kills itself: the beginning of the SQL statement
before which it does so, and at which of these. The step ``after commit`` is when a commit has returned, before that is
said.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from zlib import crc32

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
    path, max_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    killer = Killer(*(sys.argv[4], int(sys.argv[5])) if len(sys.argv) > 4 else ("never", 1))
    watch_statements(killer.statement)
    rng = random.Random(seed)
    with Spool(path, max_bytes=max_bytes) as spool:
        say("open", spool.last_seq)
        while True:
            drafts = [
                a_draft(size_bytes=rng.randrange(400), priority=rng.choice((LOWEST, LOW, NORMAL, HIGH)))
                for _ in range(rng.randrange(1, 40))
            ]
            low = max(1, spool.last_seq - rng.randrange(200))
            received = Range(low, low + rng.randrange(30))
            say("receive", *received)
            done = spool.commit(drafts, lost=rng.randrange(3), ranges=[received])
            if killer.step == AFTER_COMMIT:
                killer.here()
            account = spool.account()
            say("done", spool.last_seq, account.enqueued, account.delivered, account.dropped)
            say("bodies", done.seqs[0], *(crc32(draft.body) for draft in drafts))


def say(word: str, *numbers: int) -> None:
    print(word, *numbers, flush=True)


main()
