"""Which range of an activation its 256 steps are spread over: our own rules, the same for every engine. Pure."""

from __future__ import annotations

import math

import numpy as np

from outrider_runtimes.tensors import Array

OBSERVERS = ("min-max", "percentile", "mse")
TAIL_SHARE = 1e-4  # of the values that ``percentile`` leaves out at either end
BINS = 2048  # on either side of zero; 8 for each step of an 8-bit range
LEVELS = 256
SHRINKS = tuple(k / 64 for k in range(64, 7, -1))  # what ``mse`` tries, as shares of the whole range

Range = tuple[float, float]


class Histogram:
    """Values of one tensor, counted as they come.

    A bin is a power of two wide and starts at a multiple of it, so that a wider histogram is the narrower one with
    neighbours merged: the counts depend on the values alone, not on their order or their portions.
    """

    def __init__(self, *, counting: bool = True) -> None:
        self.low = math.inf
        self.high = -math.inf
        self._counting = counting
        self._exponent = -126
        self._counts = np.zeros(2 * BINS, np.int64)

    def update(self, values: Array) -> None:
        """Count values; those that are not finite are left out."""
        flat = np.asarray(values, np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if self._counting:
            self._widen(max(abs(self.low), abs(self.high)))
            places = np.floor(np.ldexp(flat, -self._exponent)).astype(np.int64) + BINS
            self._counts += np.bincount(places, minlength=2 * BINS)

    @property
    def counts(self) -> tuple[Array, Array]:
        """Bins that hold something: their centers (float64, ascending) and their counts (int64)."""
        (places,) = np.nonzero(self._counts)
        centers = np.clip(np.ldexp(places - BINS + 0.5, self._exponent), self.low, self.high)
        return centers, self._counts[places]

    def _widen(self, reach: float) -> None:
        if not self._counts.any():
            self._exponent = max(self._exponent, math.frexp(reach)[1] - BINS.bit_length())
        while math.ldexp(BINS, self._exponent) <= reach:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.zeros(2 * BINS, np.int64)
            self._counts[BINS // 2 : BINS // 2 + BINS] = merged
            self._exponent += 1


def find_range(observer: str, histogram: Histogram) -> Range:
    """The range to quantize; zero is always within, as padding and ReLU must be exact.

    Args:
        observer: ``min-max`` takes all values; ``percentile`` leaves out the outermost ``TAIL_SHARE`` at either end;
            ``mse`` takes the range with the smallest squared error over what was counted, never worse than min-max.
        histogram: one that counts, except for ``min-max``. Where nothing was counted the range is (0, 0).
    """
    if histogram.low > histogram.high:
        return 0.0, 0.0
    whole = (min(0.0, histogram.low), max(0.0, histogram.high))
    if observer == "min-max":
        return whole
    centers, counts = histogram.counts
    return _percentile(centers, counts, whole) if observer == "percentile" else _least_error(centers, counts, whole)


def rounding_error(centers: Array, counts: Array, bounds: Range) -> float:
    """The sum of squared errors of values after they were clipped to a range and rounded to its steps."""
    low, high = bounds
    step = (high - low) / (LEVELS - 1)
    if step <= 0.0:
        return float(np.sum(counts * centers**2))
    zero = round(-low / step)
    rounded = (np.clip(np.round(centers / step) + zero, 0, LEVELS - 1) - zero) * step
    return float(np.sum(counts * (centers - rounded) ** 2))


def _percentile(centers: Array, counts: Array, whole: Range) -> Range:
    total = np.cumsum(counts)
    cut = TAIL_SHARE * total[-1]
    low = centers[np.searchsorted(total, cut, side="right")]
    high = centers[np.searchsorted(total, total[-1] - cut, side="left")]
    return max(whole[0], min(0.0, float(low))), min(whole[1], max(0.0, float(high)))


def _least_error(centers: Array, counts: Array, whole: Range) -> Range:
    """Both ends together first, then each of them alone."""
    best, least = whole, rounding_error(centers, counts, whole)
    for low_moves, high_moves in ((True, True), (True, False), (False, True)):
        start = best
        for share in SHRINKS:
            tried = (start[0] * share if low_moves else start[0], start[1] * share if high_moves else start[1])
            error = rounding_error(centers, counts, tried)
            if error < least:
                best, least = tried, error
    return best
