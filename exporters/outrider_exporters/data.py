"""The rows that an export works with, checked before any long work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_runtimes.errors import ConfigError, InputError
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs


@dataclass(frozen=True, kw_only=True)
class Data:
    """Separate parts; a row belongs to one of them.

    Attributes:
        train: ``(inputs, targets)``: arrays by input name, and an array with one target a row. ``fit`` and ``Distill``
            use it; None when no pass trains.
        calibration: arrays by input name, for the ranges of quantized variants; None when nothing is quantized.
        certification: ``(inputs, targets)``, rows that no pass sees, for the threshold of ``Offload``; else None.
        test: whatever ``evaluate(predict, test)`` takes. When it is ``(inputs, targets)`` or ``inputs``, with the
            interface's names and shapes, the golden rows are taken from it.
    """

    train: tuple[Tensors, Array] | None = None
    calibration: Tensors | None = None
    certification: tuple[Tensors, Array] | None = None
    test: Any


def check_data(data: Data, interface: Interface) -> None:
    """Refuse what training, calibration or the golden check would silently accept.

    Raises:
        ConfigError: naming the part (``data.train``), the tensor and what was expected.
    """
    if not isinstance(data, Data):
        raise ConfigError(
            f"data is a {type(data).__name__}, not a Data", hint="Data(train=..., calibration=..., test=...)"
        )
    if data.test is None:
        raise ConfigError("data.test is None: there is nothing to evaluate on", hint="hold rows back for the test")
    if data.train is not None:
        check_labelled(data.train, interface, part="data.train")
    if data.calibration is not None:
        check_rows(data.calibration, interface, part="data.calibration")
    inputs = inputs_of_test(data.test, interface)
    if inputs is not None:
        check_rows(inputs, interface, part="data.test")


def check_rows(inputs: Any, interface: Interface, *, part: str) -> int:
    """The number of rows of arrays by input name; at least one.

    Raises:
        ConfigError: ``part`` is not a mapping of arrays that fit the interface, has no rows or has NaN.
    """
    if not isinstance(inputs, Mapping):
        raise ConfigError(
            f"{part} is a {type(inputs).__name__}, expected arrays by input name",
            hint=f"{part} = {{{interface.inputs[0].name!r}: array, ...}}",
        )
    try:
        arrays = check_inputs(interface, inputs)
    except InputError as error:
        raise ConfigError(f"{part}: {error}", hint=error.hint) from None
    rows = min((len(a) for a, spec in zip(arrays, interface.inputs, strict=True) if spec.batched), default=1)
    if rows == 0:
        raise ConfigError(f"{part} is empty: its arrays have 0 rows")
    return rows


def inputs_of_test(test: Any, interface: Interface) -> Tensors | None:
    """The inputs in ``data.test`` where it is ``(inputs, targets)`` or ``inputs``, by the interface's names."""
    first = test[0] if isinstance(test, tuple | list) and test else test
    if isinstance(first, Mapping) and set(first) == {spec.name for spec in interface.inputs}:
        return first
    return None


def draw_rows(inputs: Tensors, interface: Interface, *, rows: int, seed: int) -> dict[str, Array]:
    """At most ``rows`` rows in their order, the same for the same seed. Inputs without a batch axis are kept whole."""
    total = check_rows(inputs, interface, part="rows")
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(rows, total), replace=False))
    return {
        s.name: np.ascontiguousarray(inputs[s.name][chosen] if s.batched else inputs[s.name]) for s in interface.inputs
    }


def check_labelled(pair: Any, interface: Interface, *, part: str) -> None:
    """Raise ConfigError unless it is a pair of inputs by name and one target a row."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ConfigError(f"{part} is not a pair", hint=f"{part} = (inputs by name, targets)")
    rows = check_rows(pair[0], interface, part=f"{part} inputs")
    targets = pair[1]
    if not isinstance(targets, np.ndarray) or targets.ndim == 0:
        raise ConfigError(f"{part} targets are a {type(targets).__name__}, expected an array with one target a row")
    if len(targets) != rows:
        raise ConfigError(f"{part} has {rows} rows of inputs and {len(targets)} targets")
    if targets.dtype.kind == "f" and not np.isfinite(targets).all():
        raise ConfigError(f"{part} targets have NaN or infinite values")
