"""Writes to the spool named as argument until it is killed; says on stdout what is committed."""

from __future__ import annotations

import random
import sys

from outrider.telemetry.record import Range
from outrider.telemetry.spool import HIGH, LOW, Spool
from support.telemetry import a_draft


def main() -> None:
    path, seed = sys.argv[1], int(sys.argv[2])
    rng = random.Random(seed)
    with Spool(path, max_bytes=200_000) as spool:
        print("open", spool.last_seq, flush=True)
        while True:
            drafts = [
                a_draft(size_bytes=rng.randrange(400), priority=rng.choice((LOW, HIGH)))
                for _ in range(rng.randrange(1, 40))
            ]
            low = max(1, spool.last_seq - rng.randrange(200))
            spool.commit(drafts, lost=rng.randrange(3), ranges=[Range(low, low + rng.randrange(30))])
            account = spool.account()
            print("done", spool.last_seq, account.enqueued, account.delivered, account.dropped, flush=True)


main()
