"""How alike the answers of two variants are, on the rows that ``evaluate`` asked both about."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outrider_exporters.rows import Predict
from outrider_runtimes.tensors import Array, Tensors

MAX_BYTES = 2**28  # of answers that are kept of one variant; a generator of images gives many


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """A variant beside the float32 one of its format.

    Attributes:
        rows: how many were compared; 0 where ``evaluate`` asked the two about different rows.
        snr_db: power of the float outputs over the power of their difference, in decibels; None for no difference.
        changed: the share of decisions (the largest of the last axis) that differ; None where nothing is decided.
    """

    rows: int
    snr_db: float | None
    changed: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As JSON stores it."""
        return {"rows": self.rows, "snr_db": self.snr_db, "changed": self.changed}


class Recording:
    """A ``predict`` that keeps what it answered, until it is too much."""

    def __init__(self, predict: Predict) -> None:
        self.calls: list[tuple[bytes, Mapping[str, Array]]] = []
        self._predict = predict
        self._left = MAX_BYTES

    def __call__(self, inputs: Tensors) -> dict[str, Array]:
        """Answer, and keep."""
        outputs = self._predict(inputs)
        self._left -= sum(array.nbytes for array in outputs.values())
        if self._left >= 0:
            self.calls.append((_digest(inputs), {name: array.copy() for name, array in outputs.items()}))
        return outputs


def likeness(before: Recording, after: Recording, *, decides: str = "") -> Likeness:
    """Compare two recordings as far as they were asked the same.

    Args:
        decides: the output whose largest value decides; empty where there is none.
    """
    same = [(a, b) for (x, a), (y, b) in zip(before.calls, after.calls, strict=False) if x == y]
    power = noise = 0.0
    changed = decisions = rows = 0
    for one, other in same:
        floats = [name for name, array in one.items() if array.dtype.kind == "f"]
        power += sum(_energy(one[name]) for name in floats)
        noise += sum(_energy(one[name].astype(np.float64) - other[name]) for name in floats)
        rows += max((len(array) for array in one.values() if array.ndim), default=1)
        if decides:
            turned = one[decides].argmax(-1) != other[decides].argmax(-1)
            changed, decisions = changed + int(turned.sum()), decisions + turned.size
    return Likeness(
        rows=rows,
        snr_db=10.0 * math.log10(power / noise) if power > 0.0 and noise > 0.0 else None,
        changed=changed / decisions if decisions else None,
    )


def _energy(array: Array) -> float:
    return float((array.astype(np.float64) ** 2).sum())


def _digest(inputs: Tensors) -> bytes:
    made = hashlib.sha256()
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        made.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        made.update(array.data if array.size else b"")
    return made.digest()
