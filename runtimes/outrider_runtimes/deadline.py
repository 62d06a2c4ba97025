"""One point in time by which a call has answered or failed; everything under the call shares it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from outrider_runtimes.errors import ConfigError, DeadlineExceeded

Clock = Callable[[], float]

LONGEST_MS = 1e12  # 31 years; locks and sockets refuse a timeout of more than some centuries


class Deadline:
    """A point on a monotonic clock, in seconds.

    >>> Deadline.after_ms(50.0).remaining_s() <= 0.05
    True
    """

    __slots__ = ("_clock", "at_s")

    def __init__(self, at_s: float, *, clock: Clock = time.monotonic) -> None:
        self.at_s = at_s
        self._clock = clock

    @classmethod
    def after_ms(cls, milliseconds: float | None, *, clock: Clock = time.monotonic) -> Deadline:
        """So many milliseconds from now; None is never, and so is infinity.

        Raises:
            ConfigError: not a number above 0, or one of more than 31 years.
        """
        if milliseconds is None:
            return cls(math.inf, clock=clock)
        try:
            usable = not isinstance(milliseconds, bool) and (0 < milliseconds <= LONGEST_MS or milliseconds == math.inf)
            seconds = float(milliseconds) / 1000.0
        except (TypeError, ValueError, ArithmeticError):  # an array, a Decimal of NaN
            usable = False
        if not usable:
            given = f"{milliseconds!r:.40}"
            raise ConfigError(f"deadline_ms is {given}, expected a number above 0 and up to {LONGEST_MS:g}, or None")
        # A float32 would make a float32 of the clock's time, which ticks in fractions of a second after some days.
        return cls(clock() + seconds, clock=clock)

    def remaining_s(self) -> float:
        """Seconds left, 0.0 when it has passed, ``math.inf`` for never."""
        return max(0.0, self.at_s - self._clock())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self._clock() >= self.at_s

    def timeout_s(self) -> float | None:
        """The time left as sockets and futures take it: None for never. Raises DeadlineExceeded when none is left."""
        if self.at_s == math.inf:
            return None
        remaining = self.at_s - self._clock()
        if remaining <= 0.0:
            raise DeadlineExceeded("no time is left")
        return remaining
