"""What a network says of classes, as a caller wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs, spec_named
from outrider_runtimes.processing.fields import Axis, Name, StoredStep, Whole
from outrider_runtimes.processing.specs import inner_axis, need_dtype, replaced
from outrider_runtimes.scores import softmax
from outrider_runtimes.tensors import Array, TensorSpec

FLOATS = ("float32", "float16", "float64")
MAX_TOP = 4096


@dataclass(frozen=True, kw_only=True)
class Softmax(StoredStep):
    """``exp(x - max) / sum`` over one axis.

    Attributes:
        tensor: floats; float16 is worked on as float32.
        axis: any but the batch.
    """

    kind: ClassVar[str] = "softmax"
    tensor: Name
    axis: Axis = -1

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        need_dtype(spec, *FLOATS)
        inner_axis(spec, self.axis)
        return {**specs, self.tensor: replace(spec, range=(0.0, 1.0))}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        x = tensors[self.tensor]
        return {**tensors, self.tensor: softmax(_wide(x), axis=self.axis).astype(x.dtype, copy=False)}


@dataclass(frozen=True, kw_only=True)
class Sigmoid(StoredStep):
    """``1 / (1 + exp(-x))`` of each value.

    Attributes:
        tensor: floats; float16 is worked on as float32.
    """

    kind: ClassVar[str] = "sigmoid"
    tensor: Name

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        need_dtype(spec, *FLOATS)
        return {**specs, self.tensor: replace(spec, range=(0.0, 1.0))}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        x = tensors[self.tensor]
        return {**tensors, self.tensor: sigmoid(_wide(x)).astype(x.dtype, copy=False)}


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without an overflow: as tanh, which has none."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def _wide(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype == np.float16 else x


@dataclass(frozen=True, kw_only=True)
class TopK(StoredStep):
    """The best classes and their scores, best first; where two are level, the lower class comes first.

    Attributes:
        tensor: floats, the classes last: [N, ..., C]; its place is taken by the two below. NaN comes after all numbers.
        k: how many.
        scores: the name of [N, ..., k], of the tensor's dtype.
        classes: the name of [N, ..., k], int64: numbers of classes, which ``labels`` of the interface names.
    """

    kind: ClassVar[str] = "top_k"
    tensor: Name
    k: Annotated[int, Whole(1, MAX_TOP)]
    scores: Name = "scores"
    classes: Name = "classes"

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        need_dtype(spec, *FLOATS)
        axis = inner_axis(spec, -1)
        count = spec.shape[axis]
        if count is None or count < self.k:
            raise FormatError(f"{self.tensor!r} has {count} classes, {self.k} are asked for")
        best = replace(spec, name=self.scores, shape=(*spec.shape[:axis], self.k))
        which = replace(best, name=self.classes, dtype="int64", range=(0.0, count - 1.0), meaning="")
        return replaced(specs, self.tensor, {self.scores: best, self.classes: which})

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        x = tensors[self.tensor]
        order = np.argsort(-x, axis=-1, kind="stable")[..., : self.k]
        return replaced(
            tensors,
            self.tensor,
            {self.scores: np.take_along_axis(x, order, axis=-1), self.classes: order.astype(np.int64)},
        )


@dataclass(frozen=True, kw_only=True)
class Argmax(StoredStep):
    """The number of the greatest value along one axis; of equal ones the first. NaN is above all numbers.

    Attributes:
        tensor: numbers; becomes int64 and loses the axis.
        axis: any but the batch.
    """

    kind: ClassVar[str] = "argmax"
    tensor: Name
    axis: Axis = -1

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = spec_named(specs, self.tensor)
        axis = inner_axis(spec, self.axis)
        count = spec.shape[axis]
        if not count:
            raise FormatError(f"{self.tensor!r} has shape {list(spec.shape)}: axis {axis} needs a size")
        return {
            **specs,
            self.tensor: replace(
                spec,
                dtype="int64",
                shape=(*spec.shape[:axis], *spec.shape[axis + 1 :]),
                axes=spec.axes[:axis] + spec.axes[axis + 1 :],
                range=(0.0, count - 1.0),
            ),
        }

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        return {**tensors, self.tensor: tensors[self.tensor].argmax(axis=self.axis).astype(np.int64, copy=False)}
