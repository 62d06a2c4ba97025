"""Images to another size: Pillow's separable, antialiased filters, in numpy.

Each output value is a weighted sum of the input values under a filter that is widened by the factor of reduction;
columns first, then rows. For integers Pillow's arithmetic is kept: weights in fixed point and a rounded, clipped
image between the two passes, so that the results are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from outrider_runtimes.tensors import Array

METHODS = ("bilinear", "bicubic", "nearest")
FIXED_POINT_BITS = 22  # a weight of 1.0 times 255 fits 32 bits with room for a bicubic's overshoot
CUBIC_A = -0.5
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # the half width of a filter that does not reduce
CHUNK_VALUES = 2**18  # that are weighed at once, which bounds what lies between
MAX_TABLES = 32  # four sizes of cameras in and out, rows and columns, and some


@dataclass(frozen=True, kw_only=True)
class _Taps:
    """The filter of one axis: output ``i`` is the sum over ``k`` of ``weights[k, i, 0] * input[positions[k, i]]``."""

    positions: NDArray[np.intp]
    weights: Array


def resample(image: Array, axes: tuple[int, int], size: tuple[int, int], method: str) -> Array:
    """An image in another size, of its own dtype; other axes are kept.

    Args:
        image: uint8 or float32, any number of axes; any dtype for ``nearest``.
        axes: which of them are the height and the width.
        size: the new height and width.
        method: out of ``METHODS``.
    """
    for axis, after in zip(reversed(axes), reversed(size), strict=True):
        before = image.shape[axis]
        if before == after:
            continue
        if method == "nearest":
            image = image.take(_nearest(before, after), axis=axis)
        else:
            image = _along(image, axis, _taps(before, after, method, image.dtype.kind == "u"))
    return image


def _along(image: Array, axis: int, taps: _Taps) -> Array:
    """One axis through its filter. That axis comes first, so that whole rows are weighed at once."""
    front = np.ascontiguousarray(np.moveaxis(image, axis, 0))
    rows = front.reshape(len(front), -1)
    size = taps.weights.shape[1]
    made = np.empty((size, rows.shape[1]), image.dtype)
    columns = max(1, CHUNK_VALUES // max(len(rows), size))
    for start in range(0, rows.shape[1], columns):
        part = slice(start, start + columns)
        made[:, part] = _weighed(rows[:, part], taps)
    return np.moveaxis(made.reshape(size, *front.shape[1:]), 0, axis)


def _weighed(rows: Array, taps: _Taps) -> Array:
    work = taps.weights.dtype
    rows = rows.astype(work)
    total = np.empty((taps.weights.shape[1], rows.shape[1]), work)
    total[...] = 1 << (FIXED_POINT_BITS - 1) if work == np.int32 else 0
    part = np.empty_like(total)
    for positions, weights in zip(taps.positions, taps.weights, strict=True):
        np.take(rows, positions, axis=0, out=part, mode="clip")  # the mode that needs no copy of its own
        np.multiply(part, weights, out=part)
        np.add(total, part, out=total)
    if work == np.int32:
        total >>= FIXED_POINT_BITS
        np.clip(total, 0, 255, out=total)
    return total


@lru_cache(maxsize=MAX_TABLES)
def _taps(before: int, after: int, method: str, fixed_point: bool) -> _Taps:
    scale = before / after
    widened = max(scale, 1.0)
    support = _SUPPORT[method] * widened
    middles = (np.arange(after) + 0.5) * scale
    # intp: 32-bit numpy takes no other index.
    first = np.maximum((middles - support + 0.5).astype(np.intp), 0)
    last = np.minimum((middles + support + 0.5).astype(np.intp), before)
    positions = first + np.arange(math.ceil(support) * 2 + 1)[:, np.newaxis]
    weights = _FILTERS[method]((positions - middles + 0.5) / widened)
    weights[positions >= last] = 0.0
    weights /= weights.sum(axis=0)
    used = weights.any(axis=1)
    positions, weights = np.minimum(positions[used], before - 1), weights[used]
    weights = weights[..., np.newaxis]
    if fixed_point:
        scaled = weights * (1 << FIXED_POINT_BITS)
        return _Taps(positions=positions, weights=np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32))
    return _Taps(positions=positions, weights=weights.astype(np.float32))


@lru_cache(maxsize=MAX_TABLES)
def _nearest(before: int, after: int) -> NDArray[np.intp]:
    """The input under the middle of each output."""
    found: NDArray[np.intp] = (2 * np.arange(after) + 1) * before // (2 * after)
    return found


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys's cubic convolution (1981)."""
    x = np.abs(x)
    near = ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * CUBIC_A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {"bilinear": _triangle, "bicubic": _cubic}
