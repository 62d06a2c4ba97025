"""Figures of a network or a model file: what ``evaluate`` says, and how long one row takes on this host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from outrider_exporters.rows import Predict
from outrider_runtimes.errors import ExportError, OutriderError

Evaluate = Callable[[Predict, Any], Mapping[str, float]]

LATENCY_THREADS = 1  # what a board with other work gives, and what is comparable between hosts
WARM_UPS = 5
ROUNDS = 101
FEWEST_ROUNDS = 11
BUDGET_S = 3.0  # a network of 100 ms a row gets fewer rounds, not a minute


def metrics_of(
    evaluate: Evaluate, predict: Predict, test: Any, *, what: str, expected: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The metrics of one ``predict`` function.

    Args:
        what: whose metrics these are, for errors: ``the original model``, ``after prune``, ``variant onnx-int8``.
        expected: the metrics from before, whose names must come again.

    Raises:
        ExportError: ``evaluate`` raised, gave no mapping of names to finite numbers, or other names than before.
    """
    try:
        given = evaluate(predict, test)
    except Exception as error:
        hint = error.hint if isinstance(error, OutriderError) else ""
        raise ExportError(f"evaluate raised {type(error).__name__} ({what}): {error}", hint=hint) from error
    if not isinstance(given, Mapping) or not given:
        raise ExportError(
            f"evaluate gave {given!r} ({what}), expected figures by name", hint='return {"accuracy": 0.97}'
        )
    metrics = {_name(key, what): _figure(key, value, what) for key, value in given.items()}
    if expected is not None and set(metrics) != set(expected):
        raise ExportError(f"evaluate gave {sorted(metrics)} ({what}), before that {sorted(expected)}")
    return metrics


def latencies_p50_ms(
    runs: Mapping[str, Callable[[], object]], *, seed: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median time of each call, in milliseconds, measured in rounds of shuffled order so that they share what the
    host does meanwhile.

    Args:
        runs: one call each, by name.
        clock: seconds.
    """
    names, rng = sorted(runs), np.random.default_rng(seed)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARM_UPS):
            runs[name]()
    begun = clock()
    for done in range(ROUNDS):
        if done >= FEWEST_ROUNDS and clock() - begun > BUDGET_S * len(names):
            break
        for at in rng.permutation(len(names)):
            start = clock()
            runs[names[at]]()
            times[names[at]].append(clock() - start)
    return {name: float(np.median(values)) * 1000.0 for name, values in times.items()}


def _name(key: object, what: str) -> str:
    if not isinstance(key, str) or not key:
        raise ExportError(f"evaluate gave the name {key!r} ({what}), expected a string")
    return key


def _figure(name: str, value: Any, what: str) -> float:
    try:
        figure = float(value)
    except (TypeError, ValueError):
        raise ExportError(f"evaluate gave {name} = {value!r} ({what}), expected a number") from None
    if not math.isfinite(figure):
        raise ExportError(f"evaluate gave {name} = {figure} ({what}), expected a finite number")
    return figure
