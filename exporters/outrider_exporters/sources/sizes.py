"""Axes that a network leaves free: that it takes other sizes of them, and which of its outputs follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider_exporters.rows import UNNAMED_AXES, Sizes, free_axes, free_letters, resize_axes, sizes_text
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import BATCH_AXIS, MAX_SIGNATURES, Array, Tensors, TensorSpec

Run = Callable[[Tensors], Sequence[Array]]  # a network on arrays by name; raises ExportError


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a network gave when its free axes had these sizes."""

    sizes: Sizes
    outputs: Sequence[Array]


def check_free(dynamic_axes: Mapping[str, str], axes: Mapping[str, str]) -> None:
    """Refuse free axes that are not there.

    Args:
        dynamic_axes: by tensor name, the letters of its free axes.
        axes: by input name, its letters.

    Raises:
        ExportError: naming the tensor and the letter.
    """
    for name, letters in dynamic_axes.items():
        if name not in axes:
            raise ExportError(
                f"dynamic_axes: there is no input {name!r}",
                hint=f"the inputs are {sorted(axes)}; which outputs follow is found by running the network",
            )
        for letter in letters:
            if letter == BATCH_AXIS:
                raise ExportError(f"dynamic_axes: N of {name!r} is free already", hint="name the other axes only")
            if letter not in axes[name]:
                raise ExportError(
                    f"dynamic_axes: input {name!r} has the axes {axes[name]!r}, no {letter!r}",
                    hint=f'axes={{{name!r}: "..."}} names them, a letter a dimension',
                )


def sizes_in(inputs: Tensors, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """The size of every free axis. Raises ExportError where one letter has two sizes."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, letter in free_axes(spec).items():
            size = inputs[spec.name].shape[axis]
            if sizes.setdefault(letter, size) != size:
                raise ExportError(
                    f"the example has {letter} = {sizes[letter]} and, in {spec.name!r}, {letter} = {size}",
                    hint="the same letter is one size in all inputs; give axes that differ letters that differ",
                )
    return sizes


def other_sizes(size: int) -> tuple[int, ...]:
    """What to try beside a size: its neighbours, a double and a half for networks that halve and double, and 1."""
    tried = (size + 1, size - 1, size * 2, size // 2, 1)
    return tuple(dict.fromkeys(other for other in tried if other not in (0, size)))


def probe(run: Run, inputs: Tensors, specs: Sequence[TensorSpec]) -> tuple[Seen, ...]:
    """The network at other sizes of each free axis, one axis at a time: every run that worked.

    Raises:
        ExportError: it runs at the example's size of an axis only.
    """
    seen = []
    given = sizes_in(inputs, specs)
    for letter, size in given.items():
        failures: list[ExportError] = []
        worked = []
        for other in other_sizes(size):
            sizes = {**given, letter: other}
            try:
                worked.append(Seen(sizes=sizes, outputs=run(resize_axes(inputs, specs, {letter: other}))))
            except ExportError as error:
                failures.append(error)
        if all(run.sizes[letter] == 1 for run in worked):  # which may be broadcasting
            raise ExportError(
                f"{letter} cannot be free: the network takes {letter} = {size} and no other size: {failures[0]}",
                hint="use x.shape in forward, not a number; inputs with one size of it are all to be in dynamic_axes",
            )
        seen += worked
    return tuple(seen)


def check_sizes(run: Run, inputs: Tensors, specs: Sequence[TensorSpec], asked: Sequence[Sizes]) -> None:
    """Run the network at every size that was asked for. Raises ExportError that names one which it cannot take."""
    for sizes in asked:
        try:
            run(resize_axes(inputs, specs, sizes))
        except ExportError as error:
            raise ExportError(
                f"shapes: the network cannot take {sizes_text(sizes)}: {error}", hint="leave this size out of shapes"
            ) from error


def follow(name: str, letters: str, base: tuple[Sizes, Array], seen: Sequence[tuple[Sizes, Array]]) -> dict[int, str]:
    """The axes of an output that follow free axes, each with its letter: the input's where the size is the same.

    Args:
        letters: of the output's axes, as they would be if none followed.
        base: the example's sizes, and the output for it.
        seen: the same for other sizes.

    Raises:
        ExportError: its number of axes is another at another size.
    """
    runs, (given, first) = [base, *seen], base
    if any(array.ndim != first.ndim for _, array in runs):
        raise ExportError(f"output {name!r} has another number of axes at another size of a free axis")
    spare = [letter for letter in UNNAMED_AXES if letter not in letters and letter not in given]
    found = {}
    for axis in range(first.ndim):
        if all(array.shape[axis] == first.shape[axis] for _, array in runs):
            continue
        same = [a for a in given if all(array.shape[axis] == sizes[a] for sizes, array in runs)]
        found[axis] = same[0] if same else spare.pop(0)
    return found


def with_letters(letters: str, axes: int, found: Mapping[int, str]) -> str:
    """The letters of a tensor with some of them replaced; no letter stands twice because of it."""
    taken = set(found.values())
    spare = [letter for letter in UNNAMED_AXES if letter not in letters and letter not in taken]
    plain = letters or "".join(spare.pop(0) for _ in range(axes))
    return "".join(
        found.get(axis, letter if letter not in taken else spare.pop(0)) for axis, letter in enumerate(plain)
    )


def asked_sizes(shapes: Mapping[str, Sequence[int]], specs: Sequence[TensorSpec]) -> tuple[Sizes, ...]:
    """Every combination of the sizes of ``shapes``, by letter.

    Raises:
        ConfigError: a letter is not free or has no sizes, or there are too many combinations.
    """
    free = free_letters(specs)
    for letter, sizes in shapes.items():
        if letter not in free:
            raise ConfigError(
                f"shapes: {letter!r} is no free axis", hint=f"free are {', '.join(free) or 'none'}; see dynamic_axes"
            )
        if not _are_sizes(sizes):
            raise ConfigError(f"shapes: {letter} is {sizes!r}", hint=f'shapes={{"{letter}": [8, 16]}}, each size once')
    missing = [letter for letter in free if letter not in shapes] if shapes else []
    if missing:
        raise ConfigError(f"shapes: no sizes for {missing[0]}", hint="every free axis needs its sizes in TFLite")
    if math.prod(len(sizes) for sizes in shapes.values()) > MAX_SIGNATURES:
        raise ConfigError(
            f"shapes: more combinations than the {MAX_SIGNATURES} signatures of a file", hint="ask for fewer sizes"
        )
    if not shapes:
        return ()
    return tuple(dict(zip(shapes, sizes, strict=True)) for sizes in itertools.product(*shapes.values()))


def _are_sizes(sizes: Any) -> bool:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        return False
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    return whole and len(set(sizes)) == len(sizes)
