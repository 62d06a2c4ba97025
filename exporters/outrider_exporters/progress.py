"""How long a step still takes, told from how long it took so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from outrider_exporters.passes.base import OnProgress, Progress

SOONEST_S = 1.0  # before that an estimate is a guess
FEWEST_TICKS = 2  # one unit says nothing of the next: it may have been the one that loads everything


@dataclass
class _Run:
    """One step as it goes: when it began and ticked last, and how long a unit took when it ran before."""

    began_s: float
    first: int
    known_s: float | None
    ticked_s: float
    last: int
    ticks: int = 0

    def tick(self, done: int, now_s: float) -> None:
        """Note that units were done since the last call."""
        if done > self.last:
            self.ticked_s, self.last, self.ticks = now_s, done, self.ticks + 1

    @property
    def unit_s(self) -> float | None:
        """How long a unit takes: of this run, and of the one before as if it had been one unit more of it; None where
        too little is known."""
        done, took_s = self.last - self.first, max(0.0, self.ticked_s - self.began_s)
        if self.known_s is not None:
            return (took_s + self.known_s) / (done + 1)
        return took_s / done if self.ticks >= FEWEST_TICKS and took_s >= SOONEST_S else None


def with_time_left(show: OnProgress, *, clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """``show`` with ``left_s`` filled in for steps of several units, once two calls have told that some are done.

    The units of a step are taken to be equally long; what the current one has taken already is not counted again. A
    step that starts again is timed again, and begins with what was known of it. Steps within steps are timed apart.
    What the caller filled in stays.

    Args:
        clock: seconds.
    """
    runs: dict[str, _Run] = {}

    def shown(progress: Progress) -> None:
        now_s, before = clock(), runs.get(progress.step)
        if before is None or progress.done < before.last:
            known_s = None if before is None else before.unit_s
            runs[progress.step] = _Run(
                began_s=now_s, first=progress.done, known_s=known_s, ticked_s=now_s, last=progress.done
            )
        run = runs[progress.step]
        run.tick(progress.done, now_s)
        left_s = time_left_s(run.unit_s, progress.total - progress.done, now_s - run.ticked_s)
        show(progress if progress.left_s is not None else dataclasses.replace(progress, left_s=left_s))

    return shown


def time_left_s(unit_s: float | None, units: int, since_s: float) -> float | None:
    """Seconds that so many units take, the first of which has been under way for ``since_s``; above 0, or None where
    nothing is known: nothing is left, or the last unit takes longer than it should."""
    if unit_s is None or units <= 0:
        return None
    left_s = unit_s * (units - 1) + max(0.0, unit_s - max(0.0, since_s))
    return left_s if left_s > 0.0 else None


def duration_text(seconds: float) -> str:
    """``40 s``, ``3 min``, ``1 h 20 min``: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
