"""Where an image lies in another one: shared by the steps that place it and the steps that undo it."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes

FITS = ("stretch", "letterbox")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """An image of the caller's within the network's, in the network's pixels."""

    top: int
    left: int
    height: int
    width: int


def placed(size: tuple[int, int], inside: tuple[int, int], fit: str) -> Placement:
    """How an image fills the inside. Sizes are height and width.

    ``stretch`` fills it whole. ``letterbox`` keeps the aspect ratio: the largest size that fits, rounded to the nearest
    pixel, in the middle, with the odd pixel below and at the right.
    """
    (height, width), (inside_height, inside_width) = size, inside
    if fit == "stretch":
        return Placement(top=0, left=0, height=inside_height, width=inside_width)
    if inside_width * height <= inside_height * width:
        new_height, new_width = _rounded(height * inside_width, width), inside_width
    else:
        new_height, new_width = inside_height, _rounded(width * inside_height, height)
    return Placement(
        top=(inside_height - new_height) // 2,
        left=(inside_width - new_width) // 2,
        height=new_height,
        width=new_width,
    )


def _rounded(dividend: int, divisor: int) -> int:
    """The nearest whole number, half up; at least one pixel."""
    return max(1, (2 * dividend + divisor) // (2 * divisor))


def caller_sides(callers: CallerShapes, image: str, axes: str) -> tuple[int | None, int | None]:
    """Height and width of a caller's image, None where any is allowed. Raises FormatError."""
    if image not in callers:
        raise FormatError(f"image: the caller passes no {image!r}", hint=f"there are {sorted(callers)}")
    shape = callers[image]
    if len(shape) != len(axes):
        raise FormatError(f"image: {image!r} has {len(shape)} axes, the step says {axes}")
    return shape[axes.index("H")], shape[axes.index("W")]
