"""How sure an answer is: one number from its outputs, higher is surer. The exporter certifies it, the board judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.tensors import Array, Interface, Tensors, TensorSpec

SMALLEST = 1e-30  # of a probability that is not 0


@dataclass(frozen=True, kw_only=True)
class Score:
    """Which number is taken of which output.

    Attributes:
        kind: one of ``KINDS``: ``margin``: first minus second probability, 0 to 1; ``entropy``: 1 minus the entropy as
            a share of its most, 0 to 1; ``energy``: log of the sum of the exponents of logits (Liu et al.:
            "Energy-based Out-of-distribution Detection", 2020); ``detection``: the surest box's score, 0 for
            none.
        output: float [N, ..., classes]; of ``detection`` the boxes' scores, [N, boxes].
        values: ``logits`` or ``probabilities``: what that output holds; ``detection`` takes it as it is.
    """

    kind: str = "margin"
    output: str
    values: str = "logits"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"score: kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.values not in ("logits", "probabilities"):
            raise FormatError(f"score: values is {self.values!r}, expected logits or probabilities")
        if self.kind == "energy" and self.values != "logits":
            raise FormatError("score: an energy is taken of logits; probabilities have lost it")

    def check(self, interface: Interface) -> None:
        """Raise FormatError unless the interface has such an output."""
        spec: TensorSpec | None = next((spec for spec in interface.outputs if spec.name == self.output), None)
        if spec is None:
            names = [spec.name for spec in interface.outputs]
            raise FormatError(f"score: there is no output {self.output!r}", hint=f"the outputs are {names}")
        needed = 1 if self.kind == "detection" else 2
        if not spec.dtype.startswith("float") or not spec.shape or (spec.shape[-1] or needed) < needed:
            raise FormatError(
                f"score: {self.output!r} is {spec.dtype} {list(spec.shape)}, expected float [..., {needed} or more]"
            )

    @property
    def least_threshold(self) -> float:
        """What no threshold may be below: an answer without a box, whose score is 0, is uncertain under any."""
        return SMALLEST if self.kind == "detection" else -math.inf

    def rows(self, outputs: Tensors) -> Array:
        """One number a row, float64 [N]; of ``[N, ..., classes]`` the least sure place counts. NaN where a value is."""
        array = np.asarray(outputs[self.output], dtype=np.float64)
        shape = array.shape if array.ndim > 1 else (1, *array.shape)
        array = array.reshape(shape[0], math.prod(shape[1:-1]), shape[-1])
        if self.kind == "detection":
            surest: Array = array.max(axis=(1, 2), initial=0.0)
            return surest
        if not array.size:
            return np.ones(len(array))
        with np.errstate(invalid="ignore", over="ignore"):
            least: Array = _OF_CLASSES[self.kind](array, self.values == "logits").min(axis=1)
        return least

    def least(self, outputs: Tensors) -> float:
        """The score of the least sure row; infinite where there are no rows."""
        rows = self.rows(outputs)
        return float(rows.min()) if rows.size else math.inf

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"kind": self.kind, "output": self.output, "values": self.values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """The inverse of ``to_dict``. Raises FormatError."""
        try:
            kind, output, values = data["kind"], data["output"], data["values"]
        except (KeyError, TypeError) as error:
            raise FormatError(f"score: malformed: {error!r}") from None
        if not all(isinstance(item, str) for item in (kind, output, values)):
            raise FormatError("score: kind, output and values are strings")
        return cls(kind=kind, output=output, values=values)


def softmax(x: Array, *, axis: int = -1) -> Array:
    """``exp(x - max) / sum`` over one axis, of floats, in their own precision."""
    powers: Array = np.exp(x - x.max(axis=axis, keepdims=True))
    powers /= powers.sum(axis=axis, keepdims=True)
    return powers


def _odds(array: Array, logits: bool) -> Array:
    return softmax(array) if logits else array


def _margin(array: Array, logits: bool) -> Array:
    if array.shape[-1] == 1:
        return np.ones(array.shape[:-1])
    top = np.partition(_odds(array, logits), -2, axis=-1)[..., -2:]
    difference: Array = top[..., 1] - top[..., 0]
    return difference


def _entropy(array: Array, logits: bool) -> Array:
    odds = _odds(array, logits)
    bits = -(odds * np.log(np.maximum(odds, SMALLEST))).sum(axis=-1)
    share: Array = 1.0 - bits / math.log(max(2, array.shape[-1]))
    return share


def _energy(array: Array, logits: bool) -> Array:
    most = array.max(axis=-1)
    total: Array = most + np.log(np.exp(array - most[..., None]).sum(axis=-1))
    return total


_OF_CLASSES: Mapping[str, Callable[[Array, bool], Array]] = {
    "margin": _margin,
    "entropy": _entropy,
    "energy": _energy,
}
KINDS = (*_OF_CLASSES, "detection")
