"""How much of which group goes: pure rules over counts, so that a plan can be made and tested without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from outrider_runtimes.errors import ExportError

Plan = Mapping[str, int]

# 10 * (1 - 0.9) is 0.9999999999999998 in binary floating point, and one unit is to be kept of ten.
SLACK_UNITS = 1e-9


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units of a network that can only go together: a channel with everything that feeds it and reads it.

    Attributes:
        name: of the layer that makes the units.
        kind: ``channels`` (also features of linear layers), ``heads`` or ``hidden``.
        units: how many there are now.
        step: what is left is a multiple of this.
        importance: of each unit, ascending, with a mean of 1.
    """

    name: str
    kind: str
    units: int
    step: int
    importance: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """What may be left, from most to least; one step is always left."""
        top = (self.units - 1) // self.step
        return tuple(self.step * times for times in range(top, 0, -1))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One rounding step of one group: ``kept`` units are left after it. Rungs are taken by rising ``score``."""

    group: str
    kept: int
    score: float


def by_ratio(groups: Sequence[Group], originals: Mapping[str, int], ratio: float) -> dict[str, int]:
    """The same share from every group: ``ratio`` of its original units, and then down to a multiple of its step."""
    plan = {}
    for group in groups:
        wanted = int(originals[group.name] * (1.0 - ratio) + SLACK_UNITS)
        fitting = [count for count in group.counts if count <= wanted]
        left = fitting[0] if fitting else group.counts[-1] if group.counts else group.units
        plan[group.name] = min(left, group.units) if wanted < group.units else group.units
    return plan


def layer_ladder(groups: Sequence[Group], originals: Mapping[str, int]) -> tuple[Rung, ...]:
    """Rungs that keep the removed shares of all groups as equal as rounding allows."""
    return _sorted(groups, lambda group, kept, _: 1.0 - kept / originals[group.name])


def global_ladder(groups: Sequence[Group]) -> tuple[Rung, ...]:
    """Rungs by the mean importance of the units that go with each, over all groups."""

    def score(group: Group, kept: int, before: int) -> float:
        # Units go in ascending importance: so far units - before have gone.
        gone = group.importance[group.units - before : group.units - kept]
        return sum(gone) / len(gone)

    return _sorted(groups, score)


def scan_ladder(groups: Sequence[Group], price: Callable[[Group, int, int], float]) -> tuple[Rung, ...]:
    """Rungs by ``price(group, kept, before)``: what a rung costs for what it saves."""
    return _sorted(groups, price)


def climb(groups: Sequence[Group], rungs: Sequence[Rung]) -> dict[str, int]:
    """The plan when these rungs are taken."""
    plan = {group.name: group.units for group in groups}
    for rung in rungs:
        plan[rung.group] = min(plan[rung.group], rung.kept)
    return plan


def climb_to_share(groups: Sequence[Group], rungs: Sequence[Rung], originals: Mapping[str, int], share: float) -> int:
    """The fewest rungs that leave at most ``1 - share`` of the original units of all groups."""
    total = sum(originals[group.name] for group in groups)
    plan = {group.name: group.units for group in groups}
    for taken in range(len(rungs) + 1):
        if taken:
            plan[rungs[taken - 1].group] = rungs[taken - 1].kept
        if sum(plan.values()) <= total * (1.0 - share) + SLACK_UNITS:
            return taken
    return len(rungs)


def climb_to_macs(rungs: Sequence[Rung], macs_after: Callable[[int], int], allowed: float) -> int:
    """The fewest rungs after which the network has at most ``allowed`` multiply-accumulates, by bisection.

    Args:
        macs_after: the network's when so many rungs are taken; never rises.

    Raises:
        ExportError: all rungs together are not enough.
    """
    low, high = 0, len(rungs)
    if macs_after(low) <= allowed:
        return 0
    least = macs_after(high)
    if least > allowed:
        raise ExportError(
            f"{least} MACs are left when all that can go is gone, at most {allowed:.0f} were asked for",
            hint="a smaller macs, or a smaller round_to",
        )
    while high - low > 1:
        middle = (low + high) // 2
        if macs_after(middle) <= allowed:
            high = middle
        else:
            low = middle
    return high


def _sorted(groups: Sequence[Group], score: Callable[[Group, int, int], float]) -> tuple[Rung, ...]:
    """All rungs in the order of their scores, those of one group in their own order."""
    rungs = []
    for group in groups:
        # A later rung of a group cannot be taken before an earlier one: it inherits the greater score.
        highest = -float("inf")
        for before, kept in itertools.pairwise((group.units, *group.counts)):
            highest = max(highest, score(group, kept, before))
            rungs.append(Rung(group=group.name, kept=kept, score=highest))
    return tuple(sorted(rungs, key=lambda rung: rung.score))
