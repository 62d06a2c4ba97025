"""Asking a remote, for the tests of what becomes of a request."""

from __future__ import annotations

from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded
from outrider_runtimes.remote import Remote

X = np.float32([[1.0, 2.0], [3.0, 4.0]])
DEADLINE_MS = 200.0
# What a stalled machine may add: what is promised is the deadline, what is tested here is that nothing waits for a
# server, which would be for ever.
LATE_S = 120.0
FOREVER_MS = 120_000.0


def ask(remote: Remote, milliseconds: float = FOREVER_MS) -> np.ndarray:
    """The answer's `y`; waits longer than the deadline, so that a future that never ends shows."""
    future = remote.submit({"x": X}, Deadline.after_ms(milliseconds))
    try:
        return future.result(milliseconds / 1000.0 + LATE_S).outputs["y"]
    except DeadlineExceeded:
        raise
    except FutureTimeout:
        pytest.fail("the future did not end by its deadline")


def well(remote: Remote) -> None:
    np.testing.assert_array_equal(ask(remote), X * 2)
