"""Images to the size and the values that a network takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs
from outrider_runtimes.processing.fields import Axes, Choice, Many, Name, Number, Side, StoredStep, check_area
from outrider_runtimes.processing.geometry import placed
from outrider_runtimes.processing.resample import METHODS, resample
from outrider_runtimes.processing.specs import image_size, laid_out, need_dtype, need_letters, resized, sizes_at
from outrider_runtimes.tensors import Array, TensorSpec

MAX_CHANNELS = 4096
Channels = Annotated[tuple[float, ...], Many(Number(-1e6, 1e6), 1, MAX_CHANNELS)]
Deviations = Annotated[tuple[float, ...], Many(Number(1e-6, 1e6), 1, MAX_CHANNELS)]


@dataclass(frozen=True, kw_only=True)
class ImageStep(StoredStep):
    """What steps that give an image of a stated size share.

    Attributes:
        tensor: uint8 or float32, with axes H and W.
        height, width: in pixels, of what comes out.
        axes: the tensor's.
    """

    tensor: Name
    height: Side
    width: Side
    axes: Axes = "NHWC"

    def check(self) -> None:
        """See ``StoredStep``."""
        need_letters(self.axes, "HW")
        check_area(self.height, self.width)

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, self.axes)
        need_dtype(spec, "uint8", "float32")
        return {**specs, self.tensor: resized(spec, H=self.height, W=self.width)}

    def sides(self) -> tuple[int, int]:
        """The numbers of the axes H and W."""
        return self.axes.index("H"), self.axes.index("W")


@dataclass(frozen=True, kw_only=True)
class Resize(ImageStep):
    """Stretch or shrink to one size, with Pillow's antialiased filters.

    Attributes:
        method: ``bilinear``, ``bicubic`` or ``nearest``.
    """

    kind: ClassVar[str] = "resize"
    method: Annotated[str, Choice(METHODS)] = "bilinear"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        made = ImageStep.specs(self, specs, callers)
        return {**made, self.tensor: _ranged(made[self.tensor], self.method)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        image = tensors[self.tensor]
        image_size(image.shape, self.axes, self.tensor)
        return {**tensors, self.tensor: resample(image, self.sides(), (self.height, self.width), self.method)}


@dataclass(frozen=True, kw_only=True)
class Letterbox(ImageStep):
    """Resize with the aspect ratio kept, in the middle of a ground of one value.

    Attributes:
        fill: the ground's value; whole, 0 to 255, for uint8.
        method: as of Resize.
    """

    kind: ClassVar[str] = "letterbox"
    fill: Annotated[float, Number(-1e6, 1e6)] = 114.0
    method: Annotated[str, Choice(METHODS)] = "bilinear"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        made = ImageStep.specs(self, specs, callers)
        spec = _ranged(made[self.tensor], self.method)
        if spec.dtype == "uint8" and not (self.fill.is_integer() and 0 <= self.fill <= 255):
            raise FormatError(f"fill: {self.fill:g} is no value of {self.tensor!r}, which is uint8")
        if spec.range is not None:
            spec = replace(spec, range=(min(spec.range[0], self.fill), max(spec.range[1], self.fill)))
        return {**made, self.tensor: spec}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        image = tensors[self.tensor]
        high, wide = self.sides()
        place = placed(image_size(image.shape, self.axes, self.tensor), (self.height, self.width), "letterbox")
        shape = list(image.shape)
        shape[high], shape[wide] = self.height, self.width
        ground = np.full(shape, self.fill, image.dtype)
        window = [slice(None)] * image.ndim
        window[high] = slice(place.top, place.top + place.height)
        window[wide] = slice(place.left, place.left + place.width)
        ground[tuple(window)] = resample(image, (high, wide), (place.height, place.width), self.method)
        return {**tensors, self.tensor: ground}


@dataclass(frozen=True, kw_only=True)
class CenterCrop(ImageStep):
    """The middle of an image; where an odd number of pixels goes, one more goes below and at the right."""

    kind: ClassVar[str] = "center_crop"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        made = ImageStep.specs(self, specs, callers)
        for letter, least in (("H", self.height), ("W", self.width)):
            (size,) = sizes_at(specs[self.tensor].shape, self.axes, letter)
            if size is not None and size < least:
                raise FormatError(f"{self.tensor!r} has {letter} = {size}, less than {least}")
        return made

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        image = tensors[self.tensor]
        window = [slice(None)] * image.ndim
        for axis, size in zip(self.sides(), (self.height, self.width), strict=True):
            start = (image.shape[axis] - size) // 2
            if start < 0:
                raise ShapeError(
                    f"{self.tensor!r} has shape {list(image.shape)}, the crop is {self.height} x {self.width}",
                    tensor=self.tensor,
                )
            window[axis] = slice(start, start + size)
        return {**tensors, self.tensor: image[tuple(window)]}


@dataclass(frozen=True, kw_only=True)
class Normalise(StoredStep):
    """``(x / divided_by - mean) / std``, in float32.

    Attributes:
        tensor: uint8 or float32, with an axis C.
        mean, std: one number a channel, or one for all.
        divided_by: 255 brings uint8 to 0..1, which is what means and deviations are usually of.
        axes: the tensor's.
    """

    kind: ClassVar[str] = "normalise"
    tensor: Name
    mean: Channels
    std: Deviations
    divided_by: Annotated[float, Number(1e-6, 1e6)] = 1.0
    axes: Axes = "NHWC"

    def check(self) -> None:
        """See ``StoredStep``."""
        longest = max(len(self.mean), len(self.std))
        if {len(self.mean), len(self.std)} - {1, longest}:
            raise FormatError(f"mean has {len(self.mean)} numbers, std has {len(self.std)}")
        if longest > 1 and "C" not in self.axes:
            raise FormatError(f"axes: {self.axes} has no C, and there is a mean or a deviation a channel")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, self.axes)
        need_dtype(spec, "uint8", "float32")
        count = max(len(self.mean), len(self.std))
        if count > 1 and sizes_at(spec.shape, self.axes, "C") != [count]:
            raise FormatError(f"{self.tensor!r} has shape {list(spec.shape)}, mean and std are of {count} channels")
        return {**specs, self.tensor: replace(spec, dtype="float32", range=self._range(spec))}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        factor, offset = self._per_channel
        made = np.multiply(tensors[self.tensor], factor, dtype=np.float32)
        made -= offset
        return {**tensors, self.tensor: made}

    def _range(self, spec: TensorSpec) -> tuple[float, float] | None:
        if spec.range is None:
            return None
        factor, offset = (np.atleast_1d(part).astype(np.float64) for part in self._per_channel)
        low, high = spec.range
        return float((low * factor - offset).min()), float((high * factor - offset).max())

    @cached_property
    def _per_channel(self) -> tuple[Array, Array]:
        """What to multiply by and then to subtract: float32, of a shape that stretches over the other axes."""
        mean, std = np.array(self.mean), np.array(self.std)
        after = len(self.axes) - 1 - self.axes.index("C") if max(mean.size, std.size) > 1 else 0
        shape = (-1, *[1] * after)
        factor, offset = 1.0 / (self.divided_by * std), mean / std
        return factor.astype(np.float32).reshape(shape), offset.astype(np.float32).reshape(shape)


def _ranged(spec: TensorSpec, method: str) -> TensorSpec:
    """A bicubic filter overshoots, so that values may leave their range."""
    return replace(spec, range=None) if method == "bicubic" else spec
