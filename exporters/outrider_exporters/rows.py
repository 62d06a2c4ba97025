"""Rows of an example, and what a function over them looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from outrider_runtimes.tensors import BATCH_AXIS, Array, Interface, Tensors, TensorSpec, check_named

Predict = Callable[[Tensors], dict[str, Array]]
Sizes = Mapping[str, int]  # of axes that an interface leaves free, by letter

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


def free_axes(spec: TensorSpec) -> dict[int, str]:
    """The axes of any size that have a letter, N aside."""
    return {at: a for at, a in enumerate(spec.axes) if spec.shape[at] is None and a != BATCH_AXIS}


def free_letters(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The letters of ``free_axes``, each once."""
    return tuple(dict.fromkeys(letter for spec in specs for letter in free_axes(spec).values()))


def resize_axes(inputs: Tensors, specs: Iterable[TensorSpec], sizes: Sizes) -> dict[str, Array]:
    """Inputs with other sizes of free axes: cut, or repeated from their start, so that token ids stay token ids."""
    resized = {}
    for spec in specs:
        array = np.asarray(inputs[spec.name])
        for axis, letter in free_axes(spec).items():
            if letter in sizes:
                array = np.take(array, np.arange(sizes[letter]) % array.shape[axis], axis)
        resized[spec.name] = array
    return resized


def fed_back(predict: Predict, interface: Interface, steps: int = 4) -> Predict:
    """Some calls in a row, each with the state that the one before gave: outputs ``[steps, ...]``.

    The other inputs are a new order of the same rows at every call. Without state it is ``predict`` itself.
    """
    if not interface.state:
        return predict

    def run(inputs: Tensors) -> dict[str, Array]:
        given = []
        state = {pair.input: inputs[pair.input] for pair in interface.state}
        for step in range(steps):
            moved = {s.name: np.roll(inputs[s.name], step * s.batched, 0) for s in interface.inputs}
            given.append(predict({**moved, **state}))
            state = {pair.input: given[-1][pair.output] for pair in interface.state}
        return {name: np.stack([outputs[name] for outputs in given]) for name in given[0]}

    return run


def sizes_text(sizes: Sizes) -> str:
    """``T = 8, S = 4``."""
    return ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
