"""Ratios with intervals, and a verdict that can be INVALID. Pure functions over arrays of times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_ROUNDS = 2_000
TWIN_LIMIT = 0.03  # two runs of the same thing may differ by this share, or the machine was too noisy

Times = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A contender's time over the base's: the median over blocks of the ratio of block medians.

    Attributes:
        value: below 1 is faster than the base.
        low, high: 95 % percentile-bootstrap interval over blocks.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders against one base in one interleaved run.

    Attributes:
        base: name of the contender that the others are divided by.
        p50_us, p99_us: microseconds a call, by contender.
        ratios: by contender.
        twin: the base against itself.
        valid: whether the twin stayed within ``TWIN_LIMIT``; figures of an invalid run mean nothing.
    """

    base: str
    p50_us: dict[str, float]
    p99_us: dict[str, float]
    ratios: dict[str, Ratio]
    twin: Ratio
    valid: bool

    def to_dict(self) -> dict[str, Any]:
        """As the results are stored."""
        return asdict(self)


def ratio(times: Times, base: Times, rng: np.random.Generator) -> Ratio:
    """Two contenders of one run. times, base: float64 [blocks, calls], the same blocks."""
    return _bootstrapped(np.median(times, axis=1) / np.median(base, axis=1), rng)


def _bootstrapped(by_block: Times, rng: np.random.Generator) -> Ratio:
    count = len(by_block)
    medians = np.median(by_block[rng.integers(0, count, (BOOTSTRAP_ROUNDS, count))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(value=float(np.median(by_block)), low=float(low), high=float(high))


def difference(values: Times, base: Times, rng: np.random.Generator) -> Ratio:
    """As ``ratio``, the difference of block medians, in the unit of ``values``."""
    return _bootstrapped(np.median(values, axis=1) - np.median(base, axis=1), rng)


def compare(times_ns: Mapping[str, Times], *, base: str, twin: str, rng: np.random.Generator) -> Comparison:
    """Every contender against the base.

    Args:
        times_ns: by contender, float64 [blocks, calls]; ``twin`` is a second contender that does what ``base`` does.
    """
    others = [name for name in times_ns if name not in (base, twin)]
    same = ratio(times_ns[twin], times_ns[base], rng)
    return Comparison(
        base=base,
        p50_us={name: float(np.median(times_ns[name])) / 1e3 for name in (base, *others)},
        p99_us={name: float(np.percentile(times_ns[name], 99)) / 1e3 for name in (base, *others)},
        ratios={name: ratio(times_ns[name], times_ns[base], rng) for name in others},
        twin=same,
        valid=abs(same.value - 1.0) <= TWIN_LIMIT,
    )
