"""What an agent counts, and which of its failures are worth a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

QUIET_S: Final = 60.0  # of one kind of failure, one line in so long


class Counts:
    """Of one process.

    Attributes:
        frames: what the source gave.
        answered: what of it was answered.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.frames = 0
        self.answered = 0
        self._clock = clock
        self._by_kind: Counter[tuple[str, str]] = Counter()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def fail(self, how: str, kind: str) -> int | None:
        """One more failure.

        Args:
            how: ``refused``, the input was none; ``failed``, there was no answer to it.
            kind: the error's name.

        Returns:
            How many there were of the kind since the last line about it, where it is time for one.
        """
        key = (how, kind)
        self._by_kind[key] += 1
        at_s, told = self._told.get(key, (-QUIET_S, 0))
        if self._clock() - at_s < QUIET_S:
            return None
        self._told[key] = (self._clock(), self._by_kind[key])
        return self._by_kind[key] - told

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        sums = {
            how: {kind: count for (each, kind), count in self._by_kind.items() if each == how}
            for how in ("refused", "failed")
        }
        return {"frames": self.frames, "answered": self.answered, **sums}
