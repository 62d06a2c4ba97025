"""Rows of an example, and what a function over them looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from outrider_runtimes.tensors import BATCH_AXIS, Array, Interface, Tensors, check_named

Predict = Callable[[Tensors], dict[str, Array]]

FLOAT_AXES = {0: "", 1: "N", 2: "NC", 4: "NCHW"}
INTEGER_AXES = {0: "", 1: "N", 2: "NT"}
UNNAMED_AXES = "ABDEFGIJKLMOPQR"


def default_axes(dimensions: int, dtype: str) -> str:
    """One letter a dimension for a batched tensor whose axes nobody named: PyTorch's habits, else letters only."""
    known = FLOAT_AXES if dtype.startswith("float") else INTEGER_AXES
    return known.get(dimensions, BATCH_AXIS + UNNAMED_AXES[: dimensions - 1])


def tile_rows(example: Tensors, axes: Mapping[str, str], rows: int) -> dict[str, Array]:
    """The example with exactly so many rows: its first ones, repeated where there are too few."""
    return {
        name: np.resize(array, (rows, *np.shape(array)[1:])) if axes[name].startswith(BATCH_AXIS) else np.asarray(array)
        for name, array in example.items()
    }


def example_rows(example: Tensors, interface: Interface, rows: int) -> dict[str, Array]:
    """``tile_rows`` by the axes of an interface, in its order. Raises InputError for what it does not allow."""
    ordered = check_named(interface, example)
    return tile_rows(ordered, {spec.name: spec.axes for spec in interface.inputs}, rows)


def count_rows(inputs: Tensors, interface: Interface) -> int:
    """N of inputs that were checked; 1 where the interface has no batch axis."""
    return next((int(inputs[spec.name].shape[0]) for spec in interface.inputs if spec.batched), 1)
