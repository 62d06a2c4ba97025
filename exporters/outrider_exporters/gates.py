"""Bounds that an export must meet, as pure functions over measured figures. One missed: no bundle is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from outrider_exporters.likeness import Likeness
from outrider_exporters.values import Metric, check_fields
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
        latency_ms: the median time of one row on the exporting host.
        parity: the largest difference from the torch network, as a share of the output's range.
        steps: (what was done, metrics after it), from the baseline to this variant, both included.
        likeness: to the float32 variant of the same format; None for that one.
    """

    variant: str
    metrics: Metrics
    size_bytes: int
    latency_ms: float = math.nan
    parity: float = math.nan
    steps: tuple[Step, ...] = ()
    likeness: Likeness | None = None


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
        layers: for what quantization lost, the layers whose error grew most, in words; filled in by ``export``.
    """

    gate: Mapping[str, Any]
    variant: str
    figure: float
    bound: float
    passed: bool
    text: str
    blame: str = ""
    layers: str = ""

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
    """A metric in 0..1 may get worse by at most so many percentage points against the original model's.

    >>> MaxDrop("accuracy", points=1.0)
    MaxDrop(metric='accuracy', points=1.0)

    Attributes:
        metric: its name, where higher is better, else a Metric.
        points: hundredths, 0 or more.
    """

    metric: str | Metric
    points: float = field(kw_only=True)
    kind: ClassVar[str] = "max_drop"

    def __post_init__(self) -> None:
        _check_bound(self, "points", low=0.0)

    def requires(self, baseline: Metrics) -> str:
        """The metric exists and is in 0..1."""
        name = metric_of(self.metric).name
        missing = _missing(name, baseline)
        if missing or 0.0 <= baseline[name] <= 1.0:
            return missing
        return f"metric {name!r} is {baseline[name]:g}, points are of a metric in 0..1; use MinMetric or MaxMetric"

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """Points lost against the bound."""
        metric = metric_of(self.metric)
        reached, original = figures.metrics[metric.name], baseline[metric.name]
        lost_points = loss(metric, original, reached) * 100.0
        side = "below" if metric.higher_is_better == (lost_points >= 0.0) else "above"
        return _metric_result(
            self,
            metric,
            figures,
            figure=lost_points,
            bound=self.points,
            passed=lost_points <= self.points + SLACK_POINTS,
            text=f"{metric.name} is {reached:.4f}, {abs(lost_points):.2f} points {side} the original model's "
            f"{original:.4f}; at most {self.points:g} are allowed",
        )


@dataclass(frozen=True)
class MinMetric:
    """A metric, higher is better, must reach a value."""

    metric: str | Metric
    at_least: float = field(kw_only=True)
    kind: ClassVar[str] = "min_metric"

    def __post_init__(self) -> None:
        _check_bound(self, "at_least", low=-math.inf)
        if not metric_of(self.metric).higher_is_better:
            raise ConfigError("of this metric lower is better", hint="MaxMetric(metric, at_most=...)")

    def requires(self, baseline: Metrics) -> str:
        """The metric exists."""
        return _missing(metric_of(self.metric).name, baseline)

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The metric against the bound."""
        metric = metric_of(self.metric)
        reached = figures.metrics[metric.name]
        return _metric_result(
            self,
            metric,
            figures,
            figure=reached,
            bound=self.at_least,
            passed=reached >= self.at_least,
            text=f"{metric.name} is {reached:.4f}, at least {self.at_least:g} is required",
        )


@dataclass(frozen=True)
class MaxMetric:
    """A metric, lower is better, must stay at or below a value; a name alone stands for such a metric here."""

    metric: str | Metric
    at_most: float = field(kw_only=True)
    kind: ClassVar[str] = "max_metric"

    def __post_init__(self) -> None:
        _check_bound(self, "at_most", low=-math.inf)
        if isinstance(self.metric, Metric) and self.metric.higher_is_better:
            raise ConfigError("of this metric higher is better", hint="MinMetric(metric, at_least=...)")

    def requires(self, baseline: Metrics) -> str:
        """The metric exists."""
        return _missing(metric_of(self.metric).name, baseline)

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The metric against the bound."""
        metric = Metric(metric_of(self.metric).name, higher_is_better=False)
        reached = figures.metrics[metric.name]
        return _metric_result(
            self,
            metric,
            figures,
            figure=reached,
            bound=self.at_most,
            passed=reached <= self.at_most,
            text=f"{metric.name} is {reached:.4f}, at most {self.at_most:g} is allowed",
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
        return _at_most(
            self,
            figures,
            figure=figures.size_bytes,
            bound=self.bytes,
            text=f"the file has {figures.size_bytes} bytes, at most {self.bytes} are allowed",
        )


@dataclass(frozen=True)
class MaxLatency:
    """One row may take a variant at most so many milliseconds: the median on the exporting host, one thread.

    ``export`` refuses it for a target that this host cannot speak for; see ``choose.speaks_for``.
    """

    ms: float = field(kw_only=True)
    kind: ClassVar[str] = "max_latency"

    def __post_init__(self) -> None:
        _check_bound(self, "ms", low=0.0)

    def requires(self, baseline: Metrics) -> str:
        """Nothing of the metrics."""
        return ""

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The host's median against the bound."""
        return _at_most(
            self,
            figures,
            figure=figures.latency_ms,
            bound=self.ms,
            text=f"one row takes {figures.latency_ms:.3f} ms on this host, at most {self.ms:g} are allowed",
        )


@dataclass(frozen=True)
class MaxParityError:
    """A variant's outputs may differ from the torch network's by at most such a share of the output's range."""

    share: float = field(kw_only=True)
    kind: ClassVar[str] = "max_parity_error"

    def __post_init__(self) -> None:
        _check_bound(self, "share", low=0.0)

    def requires(self, baseline: Metrics) -> str:
        """Nothing of the metrics."""
        return ""

    def judge(self, figures: Figures, baseline: Metrics) -> GateResult:
        """The largest difference against the bound."""
        return _at_most(
            self,
            figures,
            figure=figures.parity,
            bound=self.share,
            text=f"its outputs differ from the torch network's by {figures.parity:.3g} of their range, "
            f"at most {self.share:g} is allowed",
        )


def _at_most(gate: Gate, figures: Figures, *, figure: float, bound: float, text: str) -> GateResult:
    return GateResult(
        gate=gate_to_dict(gate),
        variant=figures.variant,
        figure=figure,
        bound=bound,
        passed=figure <= bound,
        text=text,
    )


GATES: dict[str, type[Any]] = {
    gate.kind: gate for gate in (MaxDrop, MinMetric, MaxMetric, MaxSize, MaxLatency, MaxParityError)
}
QUANTIZATION_GATES = ("max_drop", "min_metric", "max_metric", "max_parity_error")  # on what it can lose


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
    """The missed gates in one line each: variant, figure, bound, and the steps and layers to blame."""
    lines = []
    for result in missed:
        reasons = "; ".join(reason for reason in (result.blame, result.layers) if reason)
        lines.append(
            f"{result.variant} missed {result.gate['type']}: {result.text}" + (f" ({reasons})" * bool(reasons))
        )
    return "; ".join(lines)


def blame(steps: Sequence[Step], metric: str | Metric) -> str:
    """Which step lost most, and the metric after each: ``most was lost after prune; baseline 0.97, after prune 0.91``.

    Of a metric that is better when lower, the step after which it rose most.
    """
    metric = metric_of(metric)
    values = [(label, metrics[metric.name]) for label, metrics in steps]
    if len(values) < 2:
        return ""
    losses = [(loss(metric, before[1], after[1]), after[0]) for before, after in itertools.pairwise(values)]
    worst, label = max(losses, key=lambda item: item[0])
    trail = ", ".join(f"{label} {value:.4f}" for label, value in values)
    return f"most was lost {label}; {trail}" if worst > 0 else trail


def metric_of(metric: str | Metric) -> Metric:
    """A name alone stands for a metric of which higher is better."""
    return metric if isinstance(metric, Metric) else Metric(metric)


def gated_metric(gates: Sequence[Gate]) -> Metric | None:
    """The metric of the first gate on one, with its direction; None when no gate names a metric."""
    for gate in gates:
        if isinstance(gate, MaxMetric):
            return Metric(metric_of(gate.metric).name, higher_is_better=False)
        if isinstance(gate, MaxDrop | MinMetric):
            return metric_of(gate.metric)
    return None


def loss(metric: Metric, before: float, after: float) -> float:
    """By how much a metric got worse; below 0 when it got better."""
    return before - after if metric.higher_is_better else after - before


def _metric_result(
    gate: Gate, metric: Metric, figures: Figures, *, figure: float, bound: float, passed: bool, text: str
) -> GateResult:
    return GateResult(
        gate=gate_to_dict(gate),
        variant=figures.variant,
        figure=figure,
        bound=bound,
        passed=passed,
        text=text,
        blame="" if passed else blame(figures.steps, metric),
    )


def _missing(metric: str, baseline: Metrics) -> str:
    if metric in baseline:
        return ""
    return f"there is no metric {metric!r}; evaluate gives {', '.join(sorted(baseline))}"


def _check_bound(gate: Gate, name: str, *, low: float) -> None:
    check_fields(gate)
    if isinstance(gate, MaxDrop | MinMetric | MaxMetric):
        metric_of(gate.metric)  # a Metric checks its name
    value = getattr(gate, name)
    if not value >= low or abs(value) == math.inf:
        bound = "a number" if low == -math.inf else f"a number of {low:g} or more"
        raise ConfigError(f"{name} is {value!r}, expected {bound}")
