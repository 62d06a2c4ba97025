"""Axes in another order, tensors under another name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs, spec_named
from outrider_runtimes.processing.fields import Axes, Name, StoredStep
from outrider_runtimes.processing.specs import laid_out, replaced
from outrider_runtimes.tensors import Array, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Layout(StoredStep):
    """Axes in another order, by their letters.

    Attributes:
        tensor: any.
        axes: the tensor's.
        to: the new order. A letter that is not in ``axes`` becomes an axis of size 1; one that is left out must be of
            size 1.
    """

    kind: ClassVar[str] = "layout"
    tensor: Name
    axes: Axes = "NHWC"
    to: Axes = "NCHW"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, self.axes)
        sizes = dict(zip(self.axes, spec.shape, strict=True))
        for letter in self.axes:
            if letter not in self.to and sizes[letter] != 1:
                raise FormatError(f"{self.tensor!r} has {letter} = {sizes[letter]}, which {self.to} leaves out")
        shape = tuple(sizes.get(letter, 1) for letter in self.to)
        return {**specs, self.tensor: replace(spec, shape=shape, axes=self.to)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        array = tensors[self.tensor]
        kept = [letter for letter in self.to if letter in self.axes]
        left_out = [letter for letter in self.axes if letter not in self.to]
        turned = array.transpose([self.axes.index(letter) for letter in (*kept, *left_out)])
        sizes = dict(zip(self.axes, array.shape, strict=True))
        return {**tensors, self.tensor: turned.reshape([sizes.get(letter, 1) for letter in self.to])}


@dataclass(frozen=True, kw_only=True)
class Rename(StoredStep):
    """Another name for a tensor: the network's and the caller's may differ."""

    kind: ClassVar[str] = "rename"
    tensor: Name
    to: Name

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        return replaced(specs, self.tensor, {self.to: replace(spec_named(specs, self.tensor), name=self.to)})

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        return replaced(tensors, self.tensor, {self.to: tensors[self.tensor]})
