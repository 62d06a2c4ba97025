"""Bounds that an export must meet, as pure functions over measured figures. One missed: no bundle is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError

Metrics = Mapping[str, float]
Step = tuple[str, Metrics]

# A drop of exactly the bound passes; 0.97 - 0.96 is 0.010000000000000009 in binary floating point.
SLACK_POINTS = 1e-9


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one variant, and the way that led to it.

    Attributes:
        variant: its name.
        metrics: what ``evaluate`` gave on the device's engine.
        size_bytes: of its file.
        steps: (what was done, metrics after it), from the baseline to this variant, both included.
    """

    variant: str
    metrics: Metrics
    size_bytes: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate on one variant.

    Attributes:
        gate: the gate as data.
        variant: the variant's name.
        figure, bound: in the unit of the gate.
        passed: whether the figure meets the bound.
        text: both in words.
        blame: for a missed metric, the step that lost most and the figure after each step; else empty.
    """

    gate: Mapping[str, Any]
    variant: str
    figure: float
    bound: float
    passed: bool
    text: str
    blame: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return {**asdict(self), "gate": dict(self.gate)}


class Gate(Protocol):
    """A bound on one figure of a variant."""

    kind: ClassVar[str]

    def requires(self, baseline: Metrics) -> str:
        """What keeps this gate from being judged, in one line; empty when nothing does. Asked before any long work."""
        ...

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The gate's answer for one variant."""
        ...


@dataclass(frozen=True)
class MaxDrop:
    """A metric in 0..1, higher is better, may fall at most so many percentage points below the original model's.

    >>> MaxDrop("accuracy", points=1.0)
    MaxDrop(metric='accuracy', points=1.0)
    """

    metric: str
    points: float = field(kw_only=True)
    kind: ClassVar[str] = "max_drop"

    def __post_init__(self) -> None:
        _check_bound(self, "points", low=0.0)

    def requires(self, baseline: Metrics) -> str:
        """The metric exists and is in 0..1."""
        missing = _missing(self.metric, baseline)
        if missing or 0.0 <= baseline[self.metric] <= 1.0:
            return missing
        return f"metric {self.metric!r} is {baseline[self.metric]:g}, points are of a metric in 0..1; use MinMetric"

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """Points lost against the bound."""
        reached = figures.metrics[self.metric]
        drop_points = (baseline[self.metric] - reached) * 100.0
        allowed = self.points + SLACK_POINTS
        return GateResult(
            gate=gate_to_dict(self),
            variant=figures.variant,
            figure=drop_points,
            bound=self.points,
            passed=drop_points <= allowed,
            text=f"{self.metric} is {reached:.4f}, {drop_points:.2f} points below the original model's "
            f"{baseline[self.metric]:.4f}; at most {self.points:g} are allowed",
            blame=blame(figures.steps, self.metric) if drop_points > allowed else "",
        )


@dataclass(frozen=True)
class MinMetric:
    """A metric, higher is better, must reach a value."""

    metric: str
    at_least: float = field(kw_only=True)
    kind: ClassVar[str] = "min_metric"

    def __post_init__(self) -> None:
        _check_bound(self, "at_least", low=-math.inf)

    def requires(self, baseline: Metrics) -> str:
        """The metric exists."""
        return _missing(self.metric, baseline)

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The metric against the bound."""
        reached = figures.metrics[self.metric]
        return GateResult(
            gate=gate_to_dict(self),
            variant=figures.variant,
            figure=reached,
            bound=self.at_least,
            passed=reached >= self.at_least,
            text=f"{self.metric} is {reached:.4f}, at least {self.at_least:g} is required",
            blame=blame(figures.steps, self.metric) if reached < self.at_least else "",
        )


@dataclass(frozen=True)
class MaxSize:
    """A variant's file may have at most so many bytes."""

    bytes: int
    kind: ClassVar[str] = "max_size"

    def __post_init__(self) -> None:
        _check_bound(self, "bytes", low=1)

    def requires(self, baseline: Metrics) -> str:
        """Nothing."""
        return ""

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The file's size against the bound."""
        return GateResult(
            gate=gate_to_dict(self),
            variant=figures.variant,
            figure=figures.size_bytes,
            bound=self.bytes,
            passed=figures.size_bytes <= self.bytes,
            text=f"the file has {figures.size_bytes} bytes, at most {self.bytes} are allowed",
        )


GATES: dict[str, type[Any]] = {gate.kind: gate for gate in (MaxDrop, MinMetric, MaxSize)}


def gate_to_dict(gate: Gate) -> dict[str, Any]:
    """As a recipe file and the report store it: ``type`` and the fields."""
    return {"type": gate.kind, **asdict(gate)}  # type: ignore[call-overload]


def check_gates(gates: Sequence[Gate], baseline: Metrics) -> None:
    """Refuse gates that could not be judged. Raises ConfigError naming the gate by its place."""
    for position, gate in enumerate(gates):
        if getattr(gate, "kind", None) not in GATES:
            raise ConfigError(f"gates[{position}] is a {type(gate).__name__}, not a gate")
        reason = gate.requires(baseline)
        if reason:
            raise ConfigError(f"gates[{position}] ({gate.kind}): {reason}")


def judge(gates: Sequence[Gate], variants: Sequence[Figures], baseline: Metrics) -> tuple[GateResult, ...]:
    """Every gate on every variant, gate by gate."""
    return tuple(gate.judge(figures, baseline) for gate in gates for figures in variants)


def explain(missed: Sequence[GateResult]) -> str:
    """The missed gates in one line each: variant, figure, bound and the steps to blame."""
    lines = [f"{r.variant} missed {r.gate['type']}: {r.text}" + (f" ({r.blame})" if r.blame else "") for r in missed]
    return "; ".join(lines)


def blame(steps: Sequence[Step], metric: str) -> str:
    """Which step lost most, and the metric after each: ``most was lost in prune; baseline 0.97, after prune 0.91``."""
    values = [(label, metrics[metric]) for label, metrics in steps]
    if len(values) < 2:
        return ""
    losses = [(before[1] - after[1], after[0]) for before, after in itertools.pairwise(values)]
    worst, label = max(losses, key=lambda item: item[0])
    trail = ", ".join(f"{label} {value:.4f}" for label, value in values)
    return f"most was lost {label}; {trail}" if worst > 0 else trail


def _missing(metric: str, baseline: Metrics) -> str:
    if metric in baseline:
        return ""
    return f"there is no metric {metric!r}; evaluate gives {', '.join(sorted(baseline))}"


def _check_bound(gate: Gate, name: str, *, low: float) -> None:
    check_fields(gate)
    value = getattr(gate, name)
    if not value >= low:
        bound = "a number" if low == -math.inf else f"a number of {low:g} or more"
        raise ConfigError(f"{name} is {value!r}, expected {bound}")
