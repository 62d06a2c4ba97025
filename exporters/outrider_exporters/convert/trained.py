"""The ranges that a network learned with, brought to the tensors of its files.

A file's tensor is known by what it holds: run on the same rows, it has the values of one of the network's tensors, in
another layout perhaps. Names would not do: converters fuse, split and rename.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outrider_exporters.convert.observers import LEVELS, Range
from outrider_runtimes.errors import ExportError
from outrider_runtimes.tensors import Array, Tensors

CLOSE = 1e-4  # of the largest value; conversions that are right differ by a hundredth of it
SAME_SCALE = 1e-5  # files have scales in float32
# Of TFLite's sigmoid and softmax, and of its tanh, whatever they compute.
FIXED_SCALES = (1 / 256, 1 / 128)


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """One tensor of the network that training rounded.

    Attributes:
        label: for people.
        bounds: of its 256 steps.
        values: float32 [rows, elements], what it is on ``Trained.inputs``, not rounded; sorted in every row.
    """

    label: str
    bounds: Range
    values: Array


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training under quantization found.

    Attributes:
        inputs: rows at the interface.
        tensors: every tensor that was rounded.
        per_channel: whether the weights were rounded with a scale a channel, or one.
    """

    inputs: Tensors
    tensors: tuple[TrainedTensor, ...]
    per_channel: bool


def ranges_of(trained: Trained, activations: Iterable[Mapping[str, Array]]) -> dict[str, Range]:
    """The range of every tensor of a float file, by name: a trained one where the network has this tensor.

    The others are those that int8 files do not have, such as what goes into a fused ReLU, or that take over the range
    of another tensor; they get what they span here, and ``check_scales`` sees to it that none of them was used.

    Args:
        activations: the file's float tensors on ``trained.inputs``, one mapping a row.
    """
    rows = [{name: np.sort(values, axis=None) for name, values in row.items()} for row in activations]
    found = {}
    for name in rows[0]:
        held = [row[name] for row in rows]
        same = [tensor.bounds for tensor in trained.tensors if _holds(held, tensor.values)]
        found[name] = max(same, key=scale_of) if same else _span(held)
    return found


def check_scales(trained: Trained, scales: Mapping[str, float], what: str) -> None:
    """Refuse a file that rounds a tensor to other steps than it was trained with.

    Args:
        scales: of every computed tensor that the file rounds, by name.
        what: the file, for the error.

    Raises:
        ExportError: names the tensor.
    """
    known = [*FIXED_SCALES, *(scale_of(tensor.bounds) for tensor in trained.tensors)]
    for name, scale in scales.items():
        if not any(abs(scale - other) <= SAME_SCALE * other for other in known):
            raise ExportError(
                f"{what} rounds tensor {name!r} to steps of {scale:.6g}, which no tensor was trained with",
                hint="an operator of the file has no counterpart in the network: write that part with layers of "
                "torch.nn, keep it out with keep_float, or leave qat out",
            )


def scale_of(bounds: Range) -> float:
    """The step of a range."""
    return (max(bounds[1], 0.0) - min(bounds[0], 0.0)) / (LEVELS - 1)


def _span(held: Sequence[Array]) -> Range:
    ends = [float(value) for row in held if row.size for value in (row[0], row[-1])]
    return min([0.0, *ends]), max([0.0, *ends])


def _holds(held: Sequence[Array], values: Array) -> bool:
    if any(row.size != values.shape[1] for row in held):
        return False
    reach = max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))
    return all(float(np.abs(mine - row).max()) <= CLOSE * reach for mine, row in zip(values, held, strict=True))
