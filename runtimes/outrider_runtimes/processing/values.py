"""Other dtypes: cast, quantize, dequantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError, NotFiniteError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs, spec_named
from outrider_runtimes.processing.fields import Choice, Name, Number, StoredStep, Whole
from outrider_runtimes.processing.specs import need_dtype
from outrider_runtimes.quantized import dequantizer, quantizer
from outrider_runtimes.tensors import DTYPES, Array, TensorSpec

NUMBERS = tuple(sorted(DTYPES - {"bool"}))
STORED = ("int8", "uint8", "int16", "uint16", "int32")  # what quantized tensors are stored in


@dataclass(frozen=True, kw_only=True)
class Cast(StoredStep):
    """Another dtype. Floats to integers: round half to even. What the dtype cannot hold becomes its nearest value.

    Attributes:
        tensor: any; NaN has no integer and is refused.
        dtype: any but bool.
    """

    kind: ClassVar[str] = "cast"
    tensor: Name
    dtype: Annotated[str, Choice(NUMBERS)]

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        low, high = _limits(self.dtype)
        inside = spec.range is not None and low <= spec.range[0] and spec.range[1] <= high
        return {**specs, self.tensor: replace(spec, dtype=self.dtype, range=spec.range if inside else None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        return {**tensors, self.tensor: _cast(tensors[self.tensor], self.dtype, self.tensor)}


def _limits(dtype: str) -> tuple[float, float]:
    if dtype.startswith("float"):
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)  # Python compares them with floats exactly


def _cast(x: Array, dtype: str, name: str) -> Array:
    if np.can_cast(x.dtype, dtype):
        return x.astype(dtype)
    low, high = _limits(dtype)
    whole = not dtype.startswith("float")
    if x.dtype.kind != "f":
        mine = np.iinfo(x.dtype)
        return np.clip(x, max(low, mine.min), min(high, mine.max)).astype(dtype)
    if not whole:
        return np.clip(x, low, high).astype(dtype)
    if np.isnan(x).any():
        raise NotFiniteError(f"{name!r} has NaN, which has no value as {dtype}", tensor=name)
    rounded = np.rint(x.astype(np.float64))
    made = np.clip(rounded, low, high)
    # 2^63 and 2^64 are floats, and the largest values of int64 and uint64 are not: what lies there is set by hand.
    with np.errstate(invalid="ignore"):
        return np.where(rounded >= high, np.array(high, dtype), made.astype(dtype))


@dataclass(frozen=True, kw_only=True)
class Quantize(StoredStep):
    """``x / scale + zero_point``, rounded half to even and clipped to the dtype.

    Attributes:
        tensor: float32; NaN and infinity are refused.
        dtype: int8, uint8, int16, uint16 or int32.
    """

    kind: ClassVar[str] = "quantize"
    tensor: Name
    scale: Annotated[float, Number(1e-30, 1e30)]
    zero_point: Annotated[int, Whole(-(2**31), 2**31 - 1)] = 0
    dtype: Annotated[str, Choice(STORED)] = "int8"

    def check(self) -> None:
        """See ``StoredStep``."""
        _check_zero_point(self.zero_point, self.dtype)

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        need_dtype(spec, "float32")
        return {**specs, self.tensor: replace(spec, dtype=self.dtype, range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        x = tensors[self.tensor]
        if not np.isfinite(x).all():
            raise NotFiniteError(f"{self.tensor!r} has NaN or infinite values to quantize", tensor=self.tensor)
        return {**tensors, self.tensor: quantizer(self.scale, self.zero_point, self.dtype)(x)}


@dataclass(frozen=True, kw_only=True)
class Dequantize(StoredStep):
    """``(x - zero_point) * scale``, in float32.

    Attributes:
        tensor: int8, uint8, int16, uint16 or int32.
    """

    kind: ClassVar[str] = "dequantize"
    tensor: Name
    scale: Annotated[float, Number(1e-30, 1e30)]
    zero_point: Annotated[int, Whole(-(2**31), 2**31 - 1)] = 0

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        need_dtype(spec, *STORED)
        _check_zero_point(self.zero_point, spec.dtype)
        return {**specs, self.tensor: replace(spec, dtype="float32", range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        return {**tensors, self.tensor: dequantizer(self.scale, self.zero_point, "float32")(tensors[self.tensor])}


def _check_zero_point(zero_point: int, dtype: str) -> None:
    limits = np.iinfo(dtype)
    if not limits.min <= zero_point <= limits.max:
        raise FormatError(f"zero_point: {zero_point} is no value of {dtype}")
