"""What each structure is worth: pruned alone, at several ratios, and evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider_exporters.data import inputs_of_test
from outrider_exporters.measure import metrics_of
from outrider_exporters.passes.base import PassContext, Progress, weigh
from outrider_exporters.passes.plan import Group, Plan
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tensors import Array, Tensors

if TYPE_CHECKING:
    import torch

    from outrider_exporters.sources.module import PositionalModule

SCAN_RATIOS = (0.25, 0.5, 0.75)
SCAN_ROWS = 1000  # one row is then a tenth of a percentage point


@dataclass(frozen=True, kw_only=True)
class Point:
    """One group pruned alone.

    Attributes:
        group: its name.
        units, kept: before and after.
        drop_points: that the metric lost, in percentage points, without fine-tuning; below 0 where it gained.
        macs: multiply-accumulates that went, as a share of the network's.
    """

    group: str
    units: int
    kept: int
    drop_points: float
    macs: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The scan of a network.

    Attributes:
        metric, value: which one, and what the unpruned network has.
        rows: training rows that it was measured on.
        points: of each group by falling ``kept``.
    """

    metric: str
    value: float
    rows: int
    points: tuple[Point, ...]

    def price(self, group: Group, kept: int, before: int) -> float:
        """Points lost for each share of MACs saved between two sizes of a group; linear between what was measured."""
        lost = self._at(group.name, kept, "drop_points") - self._at(group.name, before, "drop_points")
        saved = self._at(group.name, kept, "macs") - self._at(group.name, before, "macs")
        return lost / max(saved, 1e-9)

    def drop_points(self, plan: Plan) -> float:
        """The sum of what each group of a plan costs alone; a gain of one pays for no loss of another."""
        return sum(max(0.0, self._at(name, kept, "drop_points")) for name, kept in plan.items())

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return {
            "metric": self.metric,
            "value": self.value,
            "rows": self.rows,
            "points": [
                {
                    "group": point.group,
                    "units": point.units,
                    "kept": point.kept,
                    "drop_points": round(point.drop_points, 4),
                    "macs": round(point.macs, 6),
                }
                for point in self.points
            ],
        }

    def _at(self, group: str, kept: int, figure: str) -> float:
        """A figure of a group at a size: between 0 unpruned and what was measured, further on in proportion."""
        points = [point for point in self.points if point.group == group]
        units = points[0].units
        removed = [0.0, *(float(units - point.kept) for point in points)]
        values = [0.0, *(float(getattr(point, figure)) for point in points)]
        gone = float(units - kept)
        if gone > removed[-1]:
            return values[-1] * gone / removed[-1]
        return float(np.interp(gone, removed, values))


def check_scannable(context: PassContext) -> None:
    """Raise ConfigError unless ``evaluate`` can be asked about training rows: a choice made on test rows flatters."""
    interface, data = context.asked or (context.interface, context.data)
    test = data.test
    pair = isinstance(test, tuple | list) and len(test) == 2 and inputs_of_test(test, interface) is not None
    if context.evaluate is None or not pair:
        raise ConfigError(
            "a scan asks evaluate about training rows, so data.test must have their form",
            hint="Data(train=(inputs, targets), test=(inputs, targets)), inputs being arrays by name",
        )


def scan(
    network: PositionalModule,
    context: PassContext,
    examples: tuple[torch.Tensor, ...],
    groups: Sequence[Group],
    *,
    round_to: int,
    metric: str = "",
) -> Sensitivity:
    """Prune each group alone at several ratios, on copies, and evaluate without fine-tuning on training rows.

    Raises:
        ConfigError: there is no such metric, or it is not in 0..1.
        ExportError: ``evaluate`` failed.
    """
    from outrider_exporters.passes.slicing import Slicer

    check_scannable(context)
    rows = _training_rows(context)
    base = _metrics(network, context, rows, "before the scan")
    watched = _watched(metric, base)
    macs = weigh(network, context).macs
    trials = [(group, kept) for group in groups for kept in _sizes(group)]
    points = []
    for done, (group, kept) in enumerate(trials):
        context.progress(Progress(step="scan", done=done, total=len(trials), message=f"{group.name} to {kept}"))
        probe = copy.deepcopy(network)
        Slicer(probe, examples, round_to=round_to).apply({group.name: kept})
        value = _metrics(probe, context, rows, f"{group.name} with {kept} of {group.units}")[watched]
        points.append(
            Point(
                group=group.name,
                units=group.units,
                kept=kept,
                drop_points=(base[watched] - value) * 100.0,
                macs=1.0 - weigh(probe, context).macs / macs,
            )
        )
    return Sensitivity(metric=watched, value=base[watched], rows=len(rows[1]), points=tuple(points))


def _sizes(group: Group) -> list[int]:
    """The sizes nearest to the scanned ratios; at least one."""
    wanted = [group.units * (1.0 - ratio) for ratio in SCAN_RATIOS]
    sizes = {min(group.counts, key=lambda count: abs(count - want)) for want in wanted}
    return sorted(sizes, reverse=True)


def _training_rows(context: PassContext) -> tuple[dict[str, Array], Array]:
    interface, data = context.asked or (context.interface, context.data)
    if data.train is None:
        raise ConfigError("a scan needs data.train", hint="Data(train=(inputs, targets), ...)")
    inputs, targets = data.train
    rng = np.random.default_rng(context.seed)
    chosen = np.sort(rng.permutation(len(targets))[:SCAN_ROWS])
    batched = {spec.name: spec.batched for spec in interface.inputs}
    return {name: array[chosen] if batched[name] else array for name, array in inputs.items()}, targets[chosen]


def _metrics(
    network: PositionalModule, context: PassContext, rows: tuple[Tensors, Array], what: str
) -> Mapping[str, float]:
    from outrider_exporters.sources.module import torch_predict

    if context.evaluate is None:
        raise ConfigError("a scan needs evaluate")
    return metrics_of(context.evaluate, torch_predict(network.module, context.interface), rows, what=what)


def _watched(metric: str, metrics: Mapping[str, float]) -> str:
    names = sorted(metrics)
    if metric not in metrics and (metric or len(names) > 1):
        raise ConfigError(
            f"a scan needs to know its metric; evaluate gives {', '.join(names)}", hint="Prune(metric=...)"
        )
    name = metric or names[0]
    if not 0.0 <= metrics[name] <= 1.0:
        raise ConfigError(f"metric {name!r} is {metrics[name]:g}; points are of a metric in 0..1, higher is better")
    return name
