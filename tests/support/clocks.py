"""A clock that a test holds in its hand."""

from __future__ import annotations


class ManualClock:
    """Seconds that only a test moves."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
