"""Numbers stored as integers: ``real = (stored - zero_point) * scale``. For model files and for steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from outrider_runtimes.tensors import Array


def quantizer(scale: float, zero_point: int, dtype: str) -> Callable[[Array], Array]:
    """The function from finite reals to the integers of ``dtype``.

    Round half to even, clip, cast: a cast out of range is undefined, so the clip comes first.
    """
    limits = np.iinfo(dtype)
    work = np.float32 if limits.bits <= 16 else np.float64  # what holds every value of the dtype exactly
    inverse, offset = work(1.0 / scale), work(zero_point)

    def quantize(x: Array) -> Array:
        with np.errstate(over="ignore"):  # infinity is clipped like any large value
            scaled = np.multiply(x, inverse, dtype=work)
        np.rint(scaled, out=scaled)
        scaled += offset
        return np.clip(scaled, limits.min, limits.max, out=scaled).astype(dtype)

    return quantize


def dequantizer(scale: float, zero_point: int, dtype: str) -> Callable[[Array], Array]:
    """The function from stored integers of at most 32 bits to reals of ``dtype``, a float's."""
    factor = np.float32(scale)

    def dequantize(y: Array) -> Array:
        wide: Array = y.astype(np.int64 if y.dtype.itemsize > 2 else np.int32)  # what the difference fits
        wide -= zero_point
        real: Array = wide * factor
        return real.astype(dtype, copy=False)

    return dequantize
