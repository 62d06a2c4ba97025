"""What a segmentation network says of each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs
from outrider_runtimes.processing.fields import Axes, Choice, Name, StoredStep, Text
from outrider_runtimes.processing.geometry import FITS, caller_sides, placed
from outrider_runtimes.processing.resample import resample
from outrider_runtimes.processing.specs import image_size, laid_out, need_letters, sizes_at
from outrider_runtimes.tensors import Array, TensorSpec


@dataclass(frozen=True, kw_only=True)
class MaskArgmax(StoredStep):
    """The class of each pixel, in the network's size or in that of the caller's image.

    Of equal scores the lower class. In the caller's size each pixel takes the class of the mask's pixel under its
    middle (nearest), after the ground that a letterbox added is cut off.

    Attributes:
        tensor: numbers with axes C, H and W; loses C.
        axes: the tensor's.
        dtype: of the classes: uint8, int32 or int64.
        image: the caller's image whose size the mask takes; empty for the network's size.
        image_axes: that image's.
        fit: how the image was brought to the network's size: ``stretch`` (Resize) or ``letterbox`` (Letterbox).
    """

    kind: ClassVar[str] = "mask_argmax"
    tensor: Name
    axes: Axes = "NCHW"
    dtype: Annotated[str, Choice(("uint8", "int32", "int64"))] = "uint8"
    image: Annotated[str, Text(0, 256)] = ""
    image_axes: Axes = "NHWC"
    fit: Annotated[str, Choice(FITS)] = "stretch"

    def check(self) -> None:
        """See ``StoredStep``."""
        need_letters(self.axes, "CHW")
        need_letters(self.image_axes, "HW")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, self.axes)
        sizes = dict(zip(self.axes, spec.shape, strict=True))
        count = sizes["C"]
        if not count or count - 1 > np.iinfo(self.dtype).max:
            raise FormatError(f"{self.tensor!r} has C = {count}, expected 1 to {np.iinfo(self.dtype).max + 1} classes")
        if 0 in sizes_at(spec.shape, self.axes, "HW"):
            raise FormatError(f"{self.tensor!r} has shape {list(spec.shape)}: it is empty")
        if self.image:
            sizes["H"], sizes["W"] = caller_sides(callers, self.image, self.image_axes)
        left = self.axes.replace("C", "")
        shape = tuple(sizes[letter] for letter in left)
        bounds = (0.0, count - 1.0)
        return {**specs, self.tensor: replace(spec, dtype=self.dtype, shape=shape, axes=left, range=bounds)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        mask = tensors[self.tensor].argmax(axis=self.axes.index("C")).astype(self.dtype)
        if self.image:
            mask = self._in_image(mask, image_size(shapes[self.image], self.image_axes, self.image))
        return {**tensors, self.tensor: mask}

    def _in_image(self, mask: Array, size: tuple[int, int]) -> Array:
        left = self.axes.replace("C", "")
        high, wide = left.index("H"), left.index("W")
        place = placed(size, (mask.shape[high], mask.shape[wide]), self.fit)
        window = [slice(None)] * mask.ndim
        window[high] = slice(place.top, place.top + place.height)
        window[wide] = slice(place.left, place.left + place.width)
        return resample(mask[tuple(window)], (high, wide), size, "nearest")
