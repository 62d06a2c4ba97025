"""How steps read and replace tensors: by name, and by the letters of their axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing.base import Specs, spec_named
from outrider_runtimes.tensors import Shape, TensorSpec

T = TypeVar("T")


def replaced(items: Mapping[str, T], old: str, new: Mapping[str, T]) -> dict[str, T]:
    """``items`` with others at the place of the one named ``old``. Raises FormatError for a name that is twice."""
    out: dict[str, T] = {}
    for name, item in items.items():
        for made, value in new.items() if name == old else [(name, item)]:
            if made in out:
                raise FormatError(f"there would be two tensors {made!r}")
            out[made] = value
    return out


def laid_out(specs: Specs, name: str, axes: str) -> TensorSpec:
    """The tensor of that name, whose axes must be the ones that the step says. Raises FormatError."""
    spec = spec_named(specs, name)
    if spec.axes != axes:
        raise FormatError(
            f"{name!r} has axes {spec.axes or 'without letters'}, the step works on {axes}",
            hint="the step's axes= are those of the tensor before it",
        )
    return spec


def need_letters(axes: str, letters: str) -> None:
    """Whether a step's axes have these letters. Raises FormatError."""
    missing = [letter for letter in letters if letter not in axes]
    if missing:
        raise FormatError(f"axes: {axes} has no {missing[0]}")


def need_dtype(spec: TensorSpec, *kinds: str) -> None:
    """Whether a tensor is of one of the dtypes. Raises FormatError."""
    if spec.dtype not in kinds:
        raise FormatError(f"{spec.name!r} is {spec.dtype}, expected {' or '.join(kinds)}")


def inner_axis(spec: TensorSpec, axis: int) -> int:
    """``axis`` counted from the front. Raises FormatError where there is none of that number or it is the batch."""
    count = len(spec.shape)
    if not -count <= axis < count:
        raise FormatError(f"{spec.name!r} has {count} axes, none of number {axis}")
    found = axis % count
    if found == 0 and spec.batched:
        raise FormatError(f"{spec.name!r}: axis {axis} is the batch, and each row is by itself")
    return found


def sizes_at(shape: Shape, axes: str, letters: str) -> list[int | None]:
    """The sizes of the axes with these letters."""
    return [shape[axes.index(letter)] for letter in letters]


def resized(spec: TensorSpec, **sizes: int | None) -> TensorSpec:
    """A tensor with other sizes at some letters of its axes."""
    shape = tuple(sizes.get(letter, size) for letter, size in zip(spec.axes, spec.shape, strict=True))
    return dataclasses.replace(spec, shape=shape)


def image_size(shape: tuple[int, ...], axes: str, name: str) -> tuple[int, int]:
    """Height and width of an image of this call. Raises ShapeError for an empty one."""
    height, width = shape[axes.index("H")], shape[axes.index("W")]
    if not height or not width:
        raise ShapeError(f"{name!r} has shape {list(shape)}: it is empty", tensor=name)
    return height, width
