"""What a call takes of Python's memory at its peak."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

TIMES = 3


def peak_bytes(call: Callable[[], object]) -> int:
    """The least of a few calls: the account is the process's, and threads that other tests left are in it."""
    peaks = []
    for _ in range(TIMES):
        tracemalloc.start()
        try:
            call()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
