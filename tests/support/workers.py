"""Workers over ``doubling.GatedSession``: a call that runs until the test lets it go."""

from __future__ import annotations

import math
from concurrent.futures import Future

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.runner import Answer
from outrider_runtimes.worker import Worker
from support.doubling import WAIT_S, GatedSession, x

NEVER = Deadline(math.inf)


def occupy(worker: Worker, gated: GatedSession, value: float = 1.0, deadline: Deadline = NEVER) -> Future[Answer]:
    """A request that runs until ``gated.let`` is released."""
    gated.holding = True
    future = worker.submit(x(value), deadline)
    assert gated.begun.acquire(timeout=WAIT_S)
    return future
