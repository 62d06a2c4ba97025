"""All parts of a network that can be pruned, and which of them are safe."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from outrider_exporters.passes.plan import Group, Plan
from outrider_exporters.passes.slicing.channels import channel_parts
from outrider_exporters.passes.slicing.heads import HEADS_HINT, head_parts
from outrider_exporters.passes.slicing.hidden import hidden_parts
from outrider_exporters.passes.slicing.part import Part
from outrider_exporters.passes.slicing.trace import Tensors, Wiring, alike, varied

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """What a look at a network found.

    Attributes:
        groups: what may go.
        skipped: why a layer was left out, by its name.
    """

    groups: tuple[Group, ...]
    skipped: dict[str, str]


class Slicer:
    """The hands on one network: its parts as they are now. After ``apply`` it is used up.

    Args:
        round_to: channels and hidden units stay multiples of this.
    """

    def __init__(self, network: PositionalModule, examples: Tensors, *, round_to: int) -> None:
        self.skipped: dict[str, str] = {}
        self._network = network
        trained = [parameter.requires_grad for parameter in network.parameters()]
        network.eval().requires_grad_(True)
        try:
            with torch.enable_grad():
                self._parts = {part.group.name: part for part in self._find(examples, round_to)}
        finally:
            for parameter, wanted in zip(network.parameters(), trained, strict=True):
                parameter.requires_grad_(wanted)

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they were found."""
        return tuple(self._parts.values())

    def apply(self, plan: Plan) -> None:
        """Cut until each group has the units that the plan says."""
        trained = {name: parameter.requires_grad for name, parameter in self._network.named_parameters()}
        for name, left in plan.items():
            part = self._parts[name]
            if left < part.group.units:
                part.remove(part.group.units - left)
        for name, parameter in self._network.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))

    def silence(self, plan: Plan) -> None:
        """Set to zero whatever reads the units that ``apply`` would cut."""
        for name, left in plan.items():
            part = self._parts[name]
            if left < part.group.units:
                part.silence(part.group.units - left)

    def _find(self, examples: Tensors, round_to: int) -> list[Part]:
        wiring = Wiring(self._network, examples)
        if not wiring.outputs:
            self.skipped["model"] = "its outputs lead back to no layer; forward has detach() or no_grad()"
            return []
        heads, inner = head_parts(self._network, wiring, examples, skipped=self.skipped)
        hidden = hidden_parts(self._network, wiring, round_to=round_to, skipped=self.skipped)
        fixed = [*inner, *wiring.outputs]
        channels = channel_parts(self._network, examples, round_to=round_to, fixed=fixed, skipped=self.skipped)
        return [*channels, *heads, *hidden]


def find_prunable(network: PositionalModule, examples: Tensors, *, round_to: int) -> Prunable:
    """The groups that can lose a step and leave a network that works.

    Each is tried on copies: where nothing reads the units that go, the answers must stay the same.
    """
    slicer = Slicer(copy.deepcopy(network), examples, round_to=round_to)
    skipped = dict(slicer.skipped)
    wanted = {part.group.name: part for part in slicer.parts if part.group.counts}
    good: list[Group] = []
    for exact in (True, False):
        names = [name for name, part in wanted.items() if part.exact is exact]
        if not names:
            continue
        reason = _trial(network, examples, round_to, names, exact=exact)
        for name in names:
            alone = bool(reason) and len(names) > 1
            own = _trial(network, examples, round_to, [name], exact=exact) if alone else reason
            if own:
                skipped[name] = f"{own}; {HEADS_HINT}" if wanted[name].group.kind == "heads" else own
            else:
                good.append(wanted[name].group)
    order = list(wanted)
    return Prunable(groups=tuple(sorted(good, key=lambda group: order.index(group.name))), skipped=skipped)


def _trial(network: PositionalModule, examples: Tensors, round_to: int, names: Collection[str], *, exact: bool) -> str:
    """Why these groups cannot lose one step each; empty when they can."""
    probes = varied(examples)
    silenced, cut = copy.deepcopy(network), copy.deepcopy(network)
    try:
        before = Slicer(silenced, examples, round_to=round_to)
        after = Slicer(cut, examples, round_to=round_to)
        plan = {part.group.name: part.group.counts[0] for part in after.parts if part.group.name in names}
        if exact:
            before.silence(plan)
        after.apply(plan)
        with torch.no_grad():
            wanted, got = silenced.eval()(*probes), cut.eval()(*probes)
    except Exception as error:
        return f"the network cannot lose them: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        return "an output would change its shape"
    if exact and not all(alike(a, b) for a, b in zip(wanted, got, strict=True)):
        return "the network computes something else with fewer of them"
    return ""


def channels_of(network: PositionalModule) -> dict[str, int]:
    """The output channels of every convolution and linear layer, by name."""
    return {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in network.module.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
