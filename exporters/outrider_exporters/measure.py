"""Figures of a network or a model file: what ``evaluate`` says, and how long one row takes on this host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one row takes.

    Attributes:
        p50_ms: the median over both measurements.
        noise: by how much the medians of the two differ, as a share of the smaller.
    """

    p50_ms: float
    noise: float


def latencies_p50_ms(
    runs: Mapping[str, Callable[[], object]], *, seed: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median time of each call, in milliseconds, measured in rounds of shuffled order so that they share what the
    host does meanwhile.

    Args:
        runs: one call each, by name.
        clock: seconds.
    """
    times = _times([runs[name] for name in sorted(runs)], seed, clock, budget_s=BUDGET_S * len(runs))
    return {name: _p50_ms(found) for name, found in zip(sorted(runs), times, strict=True)}


def twin_latencies(
    twins: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    *,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """The latency of each file, and what an A/A twin of the same file shows of its noise.

    All calls are measured in the same rounds of shuffled order. What lies between the two is what the host and the
    place in memory do to one file; a smaller difference between two files says nothing.

    Args:
        twins: by name, one call each of two sessions of the same file.
        clock: seconds.
    """
    names = sorted(twins)
    calls = [call for name in names for call in twins[name]]
    times = iter(_times(calls, seed, clock, budget_s=BUDGET_S * len(names)))
    return {name: _latency(next(times), next(times)) for name in names}


def _times(
    calls: Sequence[Callable[[], object]], seed: int, clock: Callable[[], float], *, budget_s: float
) -> list[list[float]]:
    """Seconds of each call, round by round, in fewer rounds where they would take longer than the budget."""
    rng = np.random.default_rng(seed)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARM_UPS):
            call()
    begun = clock()
    for done in range(ROUNDS):
        if done >= FEWEST_ROUNDS and clock() - begun > budget_s:
            break
        for at in rng.permutation(len(calls)):
            start = clock()
            calls[at]()
            times[at].append(clock() - start)
    return times


def _latency(first: Sequence[float], second: Sequence[float]) -> Latency:
    low, high = sorted((_p50_ms(first), _p50_ms(second)))
    return Latency(p50_ms=_p50_ms([*first, *second]), noise=(high - low) / low if low > 0.0 else 0.0)


def _p50_ms(times: Sequence[float]) -> float:
    return float(np.median(times)) * 1000.0


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
