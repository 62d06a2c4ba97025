"""Does one job with a spool and kills itself before the n-th step of it; says each step before it is done.

A step is a statement that is run on any database, or a file that is renamed or deleted. Arguments: the spool's path,
the job, and before which step, from 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from outrider.telemetry.record import Range
from outrider.telemetry.spool import Spool
from support.statements import watch_statements
from support.telemetry import a_draft

RECORDS: Final = 12
BOOT: Final = "boot"
MAX_AGE_S: Final = 10.0
CLAIMED: Final = 3  # of those that would expire, and that are in flight
DAMAGED: Final = (2, 3, 7)
POISONED: Final = 5
RECEIVED: Final = Range(8, 9)


class Killer:
    """Ends this process before a step, as a power cut would: nothing of it runs afterwards."""

    def __init__(self, folder: Path, at: int) -> None:
        self._folder, self._left = str(folder), at

    def step(self, name: str) -> None:
        print(name, flush=True)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(self, sql: str) -> None:
        self.step(" ".join(sql.split()[:4]))

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if name in ("os.rename", "os.remove") and str(arguments[0]).startswith(self._folder):
            self.step(f"{name} *{str(arguments[0]).removeprefix(self._folder).partition('.sqlite')[2]}")


def watch(killer: Killer) -> None:
    """Have every connection of this process tell each statement before it is run, and every change of a file."""
    watch_statements(killer.statement)
    sys.addaudithook(killer.event)


def recover(path: Path) -> None:
    """Open a spool that is damaged."""
    Spool(path).close()


def expire(path: Path) -> None:
    """Open one whose records waited too long; some of them go out meanwhile."""
    with Spool(path, max_age_s=MAX_AGE_S, clock=lambda: 1000.0, boot=BOOT) as spool:
        spool.claim(CLAIMED, after_seq=0, max_bytes=10**6)
        spool.expire()


def claim(path: Path) -> None:
    """Send what is there: some records are damaged, one is poison, and for some a receipt comes."""
    with Spool(path) as spool:
        spool.claim(RECORDS, after_seq=0, max_bytes=10**6)
        spool.set_aside(POISONED)
        spool.commit([a_draft(RECORDS)], ranges=[RECEIVED])


JOBS: Final = {job.__name__: job for job in (recover, expire, claim)}


def main() -> None:
    path, job, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    watch(Killer(path.parent, at))
    JOBS[job](path)


if __name__ == "__main__":
    main()
