"""How much a test tries: the whole, or in the loop, which ``make check`` is, a fifth. ``make test`` does the whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# Set by the Makefile for `make check` alone.
LOOP = "OUTRIDER_LOOP" in os.environ


def effort(count: int) -> int:
    """Of ``count`` tries those of this run: all, or in the loop a fifth, but ten if there are as many."""
    return min(count, max(10, count // 5)) if LOOP else count


def some(cases: Sequence[T]) -> Sequence[T]:
    """Those of ``cases`` that this run tries: all, or in the loop every fifth."""
    return cases[::5] if LOOP else cases
