"""How long a step still takes, told from how long it took so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from outrider_exporters.passes.base import OnProgress, Progress

SOONEST_S = 1.0  # before that an estimate is a guess


def with_time_left(show: OnProgress, *, clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """``show`` with ``left_s`` filled in for steps of several units, once one of them is done.

    The units of a step are taken to be equally long. A step that starts again is timed again.

    Args:
        clock: seconds.
    """
    begun: dict[str, tuple[float, int]] = {}

    def shown(progress: Progress) -> None:
        now = clock()
        since, first = begun.get(progress.step, (now, progress.done))
        if progress.step not in begun or progress.done < first:
            since, first = now, progress.done
        begun[progress.step] = (since, first)
        elapsed, done = now - since, progress.done - first
        if progress.left_s is None and done > 0 and elapsed >= SOONEST_S and progress.done < progress.total:
            progress = dataclasses.replace(progress, left_s=elapsed / done * (progress.total - progress.done))
        show(progress)

    return shown


def duration_text(seconds: float) -> str:
    """``40 s``, ``3 min``, ``1 h 20 min``: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
