"""Structured pruning: channels, attention heads and hidden units go, and the network is smaller."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from outrider_exporters.passes import plan as rules
from outrider_exporters.passes.base import PassContext, Progress, Weight, call_fit, weigh
from outrider_exporters.passes.plan import Group
from outrider_exporters.rows import example_rows
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError, OutriderError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outrider_exporters.passes.sensitivity import Sensitivity
    from outrider_exporters.sources.module import PositionalModule


EXAMPLE_ROWS = 2  # a batch of one would hide an axis that is squeezed away
MOST_REASONS = 3  # in one error; the report has them all
SCOPES = ("layer", "global", "scan")


@dataclass(frozen=True)
class Prune:
    """Remove the units of least weight, then fine-tune with ``fit``.

    A unit is a channel of a convolution, a feature of a linear layer, a head of attention or a hidden unit of a
    recurrent layer, with everything that feeds it and reads it. What makes the outputs stays. Each structure is first
    tried on a copy; one that the network cannot lose is left out and the report says why.

    Attributes:
        ratio: the share of units to remove, above 0 and below 1; or
        macs: the share of multiply-accumulates to remove, reached within one rounding step of one structure; or
        max_drop_points: with ``scope="scan"``, how far the metric may fall, in percentage points.
        round_to: what is left of channels and hidden units is a multiple of this, as the engines' kernels like it, so
            that what is reached may differ from what was asked for; the report has both.
        scope: where the units are taken from. ``layer``: the same share everywhere. ``global``: the least important
            of the whole network. ``scan``: each structure is pruned alone at several ratios and evaluated without
            fine-tuning on training rows, and the cheapest multiply-accumulates go first; the sum of the drops that
            were measured stays within ``max_drop_points``.
        steps: in how many parts, with ``fit`` after each.
        metric: that ``scan`` watches, in 0..1, higher is better; may be empty when ``evaluate`` gives one.
    """

    ratio: float = 0.0
    round_to: int = 8
    macs: float = field(default=0.0, kw_only=True)
    scope: str = field(default="layer", kw_only=True)
    steps: int = field(default=1, kw_only=True)
    max_drop_points: float = field(default=0.0, kw_only=True)
    metric: str = field(default="", kw_only=True)
    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        check_fields(self)
        scan = self.scope == "scan"
        if self.ratio and self.macs:
            raise ConfigError("ratio and macs are both given", hint="one of them says how much is to go")
        for name in ("macs",) if self.macs else () if scan and not self.ratio else ("ratio",):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, expected a number above 0 and below 1",
                    hint="Prune(ratio=0.5), Prune(macs=0.5) or Prune(scope='scan', max_drop_points=2.0)",
                )
        for name in ("round_to", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.scope not in SCOPES:
            raise ConfigError(f"scope is {self.scope!r}, expected one of {', '.join(SCOPES)}")
        if scan and not 0.0 < self.max_drop_points <= 100.0:
            raise ConfigError(f"max_drop_points is {self.max_drop_points}, a scan expects one above 0, at most 100")
        if not scan and (self.max_drop_points or self.metric):
            raise ConfigError("max_drop_points and metric are for a scan", hint="Prune(scope='scan', ...)")

    def requires(self, context: PassContext) -> None:
        """``fit`` and training rows, and torch-pruning; for a scan, an ``evaluate`` that takes training rows."""
        from outrider_exporters.passes.slicing.channels import torch_pruning

        if context.fit is None:
            raise ConfigError("prune needs fit: a pruned network must be fine-tuned", hint="export(..., fit=fit)")
        if context.data.train is None:
            raise ConfigError("prune needs data.train to fine-tune with", hint="Data(train=(inputs, targets), ...)")
        if self.scope == "scan":
            from outrider_exporters.passes.sensitivity import check_scannable

            check_scannable(context)
        torch_pruning()

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Slice and fine-tune, step by step. Gives what was asked for, reached, taken from where, and left out."""
        from outrider_exporters.passes.sensitivity import scan
        from outrider_exporters.passes.slicing import find_prunable
        from outrider_exporters.passes.slicing.slicer import channels_of

        examples = examples_of(context)
        found = find_prunable(network, examples, round_to=self.round_to)
        original, channels = copy.deepcopy(network.module), channels_of(network)
        scanned = None
        if self.scope == "scan":
            scanned = scan(network, context, examples, found.groups, round_to=self.round_to, metric=self.metric)
        work = _Work(
            network=network,
            context=context,
            examples=examples,
            originals={group.name: group.units for group in found.groups},
            macs=weigh(network, context).macs,
            scanned=scanned,
        )
        steps = self._steps(work)
        if not steps:
            raise self._nothing(found.skipped)
        left, macs = steps[-1]["kept"], steps[-1]["macs"]
        now = channels_of(network)
        return {
            "ratio_asked": self.ratio,
            "ratio_reached": round(1.0 - sum(left.values()) / sum(work.originals.values()), 4),
            "macs_asked": self.macs,
            "macs_reached": round(1.0 - macs / work.macs, 4),
            "scope": self.scope,
            "channels": {name: [n, now[name]] for name, n in channels.items() if now.get(name, n) != n},
            "groups": {g.name: {"kind": g.kind, "before": g.units, "after": left[g.name]} for g in found.groups},
            "skipped": found.skipped,
            "steps": steps,
            "sensitivity": None if scanned is None else scanned.to_dict(),
            "latency": latency(original, work, macs),
        }

    def ensures(self, before: Weight, after: Weight) -> None:
        """Fewer parameters and fewer multiply-accumulates."""
        if after.parameters >= before.parameters or after.macs >= before.macs:
            raise ExportError(
                f"{after.parameters} of {before.parameters} parameters and {after.macs} of {before.macs} MACs are left",
                hint="use a greater ratio or a smaller round_to",
            )

    def _steps(self, work: _Work) -> list[dict[str, Any]]:
        """Prune and fine-tune in parts; one entry for each part that removed something."""
        shapes = _output_shapes(work.network, work.examples)
        left, done = dict(work.originals), []
        for step in range(1, self.steps + 1):
            plan = self._plan(work, step / self.steps)
            if plan == left:
                continue
            cut(work.network, work.examples, plan, self.round_to)
            left = plan
            if _output_shapes(work.network, work.examples) != shapes:
                raise ExportError("pruning changed the shape of an output", hint="leave prune out of this recipe")
            macs = weigh(work.network, work.context).macs
            done.append({"step": step, "macs": macs, "kept": plan})
            message = f"step {step} of {self.steps}, {macs / work.macs:.0%} of the MACs are left, fine-tuning"
            work.context.progress(Progress(step=self.kind, done=step, total=self.steps, message=message))
            call_fit(work.network, work.context)
        return done

    def _plan(self, work: _Work, part: float) -> dict[str, int]:
        """What is to be left of each group when ``part`` of the way has been gone."""
        groups = work.groups(self.round_to)
        if self.scope == "layer" and self.ratio:
            return rules.by_ratio(groups, work.originals, self.ratio * part)
        if work.scanned is not None:
            ladder = rules.scan_ladder(groups, work.scanned.price)
        elif self.scope == "layer":
            ladder = rules.layer_ladder(groups, work.originals)
        else:
            ladder = rules.global_ladder(groups)
        if self.macs:
            allowed = work.macs * (1.0 - self.macs * part)
            taken = rules.climb_to_macs(
                ladder, lambda n: work.macs_with(rules.climb(groups, ladder[:n]), self.round_to), allowed
            )
        elif self.ratio:
            taken = rules.climb_to_share(groups, ladder, work.originals, self.ratio * part)
        else:
            taken = len(ladder)
        plans = [rules.climb(groups, ladder[:n]) for n in range(taken + 1)]
        return plans[-1] if work.scanned is None else self._bounded(plans, work.scanned, part)

    def _bounded(self, plans: Sequence[dict[str, int]], scanned: Sensitivity, part: float) -> dict[str, int]:
        """The last plan within the drop bound. Raises ExportError where that is less than was asked for."""
        within = [plan for plan in plans if scanned.drop_points(plan) <= self.max_drop_points * part]
        if (self.macs or self.ratio) and plans[-1] not in within:
            raise ExportError(
                f"what was asked for would cost {scanned.drop_points(plans[-1]):.2f} points before fine-tuning, "
                f"max_drop_points allows {self.max_drop_points * part:g}",
                hint="a greater max_drop_points, or a smaller ratio or macs",
            )
        return within[-1] if within else plans[0]

    def _nothing(self, skipped: Mapping[str, str]) -> ExportError:
        asked = f"macs {self.macs:g}" if self.macs else f"ratio {self.ratio:g}" if self.ratio else self.scope
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:MOST_REASONS])
        return ExportError(
            f"pruning at {asked} with round_to {self.round_to} removed nothing" + (f" ({reasons})" if reasons else ""),
            hint="use a greater ratio or a smaller round_to; it takes convolutions, linear and recurrent layers and "
            "attention of torch.nn, but not what makes the outputs",
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One pruning: the network that changes, and what it was."""

    network: PositionalModule
    context: PassContext
    examples: tuple[torch.Tensor, ...]
    originals: Mapping[str, int]
    macs: int
    scanned: Sensitivity | None

    def groups(self, round_to: int) -> list[Group]:
        """Those of the original network, as they are now."""
        from outrider_exporters.passes.slicing import Slicer

        parts = Slicer(copy.deepcopy(self.network), self.examples, round_to=round_to).parts
        return [part.group for part in parts if part.group.name in self.originals]

    def macs_with(self, plan: rules.Plan, round_to: int) -> int:
        """Multiply-accumulates that a plan would leave."""
        probe = copy.deepcopy(self.network)
        cut(probe, self.examples, plan, round_to)
        return weigh(probe, self.context).macs


def examples_of(context: PassContext) -> tuple[torch.Tensor, ...]:
    """A few rows of the example, as the network's positional arguments."""
    from outrider_exporters.sources.module import as_tensors

    return as_tensors(list(example_rows(context.example, context.interface, EXAMPLE_ROWS).values()))


def slice_channels(
    network: PositionalModule, examples: tuple[torch.Tensor, ...], *, ratio: float, round_to: int
) -> None:
    """Remove the same share of units everywhere, in place. Whether a parameter is trained stays as it was."""
    from outrider_exporters.passes.slicing import find_prunable

    groups = find_prunable(network, examples, round_to=round_to).groups
    plan = rules.by_ratio(groups, {group.name: group.units for group in groups}, ratio)
    cut(network, examples, plan, round_to)


def latency(original: nn.Module, work: _Work, macs: int) -> dict[str, Any] | None:
    """Both networks on the engine of a device, on this host; None where the context measures nothing."""
    if work.context.time_networks is None:
        return None
    try:
        times = work.context.time_networks({"before": original, "after": work.network.module}, work.context)
    except OutriderError as error:
        return {"unmeasured": str(error)}
    return {
        "before_ms": times["before"],
        "after_ms": times["after"],
        "gain": round(times["before"] / times["after"], 3),
        "macs_gain": round(work.macs / macs, 3),
    }


def cut(network: PositionalModule, examples: tuple[torch.Tensor, ...], plan: rules.Plan, round_to: int) -> None:
    """Carry a plan out, in place. Whether a parameter is trained stays as it was."""
    from outrider_exporters.passes.slicing import Slicer

    try:
        Slicer(network, examples, round_to=round_to).apply(plan)
    except OutriderError:
        raise
    except Exception as error:
        raise ExportError(
            f"this network cannot be sliced: {type(error).__name__}: {error}", hint="leave prune out of the recipe"
        ) from error


def _output_shapes(network: PositionalModule, examples: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    import torch

    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in network(*examples)]
