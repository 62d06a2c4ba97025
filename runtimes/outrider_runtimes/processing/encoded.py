"""Images as the bytes of a file, decoded where they are served. Needs the extra ``[images]``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError, InputError, MissingExtra, ShapeError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs
from outrider_runtimes.processing.fields import MAX_PIXELS, Choice, Name, StoredStep
from outrider_runtimes.processing.rows import padded
from outrider_runtimes.processing.specs import laid_out, need_dtype
from outrider_runtimes.tensors import Array, Shape, TensorSpec

if TYPE_CHECKING:
    from PIL.Image import Image

# By content type, what Pillow calls the format.
FORMATS: Mapping[str, str] = {"image/jpeg": "JPEG", "image/png": "PNG"}
_COLOURS: Mapping[str, tuple[str, int]] = {"rgb": ("RGB", 3), "grey": ("L", 1)}


def encode_images(images: Sequence[bytes], length: int | None = None) -> Array:
    """Whole files of images as a tensor: their bytes, padded with zeros.

    Args:
        length: bytes a row; as many as the longest file needs when left out, at least one.

    Returns:
        uint8 [N, T].

    Raises:
        InputError: a file is longer than ``length``.
    """
    size = max([1, *map(len, images)]) if length is None else length
    for number, image in enumerate(images):
        if len(image) > size:
            raise InputError(f"image {number} has {len(image)} bytes, expected at most {size}")
    return padded(images, size)


@dataclass(frozen=True, kw_only=True)
class DecodeImage(StoredStep):
    """The pixels of an encoded image, as Pillow decodes them; all rows of a call are images of one size.

    The orientation that a camera notes in the file is not applied.

    Attributes:
        tensor: uint8 [N, T], the bytes of a file padded with zeros, see ``encode_images``. Becomes uint8
            [N, H, W, C] with axes NHWC; H and W are those of the image.
        content_type: ``image/jpeg`` or ``image/png``; nothing else is decoded.
        colours: ``rgb`` for three channels, ``grey`` for one.
    """

    kind: ClassVar[str] = "decode_image"
    tensor: Name
    content_type: Annotated[str, Choice(tuple(FORMATS))] = "image/jpeg"
    colours: Annotated[str, Choice(tuple(_COLOURS))] = "rgb"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, "NT")
        need_dtype(spec, "uint8")
        if spec.content_type != self.content_type:
            raise FormatError(f"{self.tensor!r} is {spec.content_type or 'no file'}, expected {self.content_type}")
        made = replace(spec, shape=self.image_shape(spec.shape), axes="NHWC", range=(0.0, 255.0), content_type="")
        return {**specs, self.tensor: made}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        rows = tensors[self.tensor]
        pixels = np.empty(self.sizes(rows), np.uint8)
        for number, row in enumerate(rows):
            with self._opened(row, number) as image:
                pixels[number] = self._pixels(image, number)
        return {**tensors, self.tensor: pixels}

    def image_shape(self, shape: Shape) -> Shape:
        """The images' shape from the bytes' shape, as far as it is known before a call."""
        return (shape[0], None, None, _COLOURS[self.colours][1])

    def sizes(self, rows: Array) -> tuple[int, int, int, int]:
        """N, H, W and C of the images; their heads alone are read. Raises InputError, ShapeError."""
        found: tuple[int, int] | None = None
        for number, row in enumerate(rows):
            with self._opened(row, number) as image:
                size = (image.height, image.width)
            if found is not None and size != found:
                raise ShapeError(
                    f"{self.tensor!r}: row {number} is an image of {size[0]} x {size[1]}, the first of "
                    f"{found[0]} x {found[1]}",
                    tensor=self.tensor,
                    hint="images of one size in a call",
                )
            found = size
        height, width = found or (1, 1)
        return (len(rows), height, width, _COLOURS[self.colours][1])

    def _opened(self, row: Array, number: int) -> Image:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtra("pillow", extra="images", purpose="decoding images") from error
        try:
            image = Image.open(io.BytesIO(row.tobytes()), formats=[FORMATS[self.content_type]])
        except Image.DecompressionBombError:
            raise self._refused(number, f"has more than {MAX_PIXELS} pixels") from None
        except (OSError, SyntaxError, ValueError):
            raise self._refused(number, f"is no {self.content_type}") from None
        if image.height * image.width > MAX_PIXELS:
            raise self._refused(number, f"has {image.height} x {image.width} pixels, at most {MAX_PIXELS} are decoded")
        return image

    def _pixels(self, image: Image, number: int) -> Any:
        mode, channels = _COLOURS[self.colours]
        try:
            made = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise self._refused(number, f"cannot be decoded: {error}") from None
        return made.reshape(image.height, image.width, channels)

    def _refused(self, number: int, why: str) -> InputError:
        return InputError(f"{self.tensor!r}: row {number} {why}", tensor=self.tensor)
