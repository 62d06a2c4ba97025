"""Which operators lose what int8 loses, and the fewest of them to keep in float. Pure: files are behind functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from outrider_exporters.convert.operators import Operator, with_followers


@dataclass(frozen=True, kw_only=True)
class Loser:
    """An operator with weights, and what is lost where it is quantized.

    Attributes:
        label: the layer, or the operator's name.
        names: the operator and those without weights that follow it, by name.
        error: the output's error where only this one and a neighbour are quantized, with the neighbour that makes it
            smallest: a tensor that is hard to quantize is so in every such pair of an operator that touches it.
    """

    label: str
    names: tuple[str, ...]
    error: float


def pairs_of(operators: Sequence[Operator]) -> tuple[tuple[str, ...], ...]:
    """The operators with weights that are neighbours, producer first, whatever without weights is between them.

    One that has no such neighbour stands alone.
    """
    weighted = [operator for operator in operators if operator.weighted]
    pairs: list[tuple[str, ...]] = []
    for producer in weighted:
        given = _given(operators, with_followers(operators, [producer.name]))
        pairs += [(producer.name, o.name) for o in weighted if o is not producer and given.intersection(o.inputs)]
    alone = {operator.name for operator in weighted} - {name for pair in pairs for name in pair}
    return (*pairs, *((operator.name,) for operator in weighted if operator.name in alone))


def find_losers(operators: Sequence[Operator], error_of: Callable[[frozenset[str]], float]) -> tuple[Loser, ...]:
    """Every operator with weights, the one that loses most first.

    Neighbours are tried together: the tensor between two of them is quantized for the one when the other is kept in
    float, so that neither alone shows what it loses.

    Args:
        error_of: the error of the output where only the operators of these names are quantized.
    """
    least: dict[str, float] = {}
    for pair in pairs_of(operators):
        error = error_of(frozenset(with_followers(operators, pair)))
        for name in pair:
            least[name] = min(error, least.get(name, error))
    order = {operator.name: place for place, operator in enumerate(operators)}
    losers = [
        Loser(
            label=operator.label,
            names=tuple(sorted(with_followers(operators, [operator.name]), key=order.__getitem__)),
            error=least[operator.name],
        )
        for operator in operators
        if operator.name in least
    ]
    return tuple(sorted(losers, key=lambda loser: -loser.error))


def keep_until(losers: Sequence[Loser], holds: Callable[[Sequence[Loser]], bool]) -> tuple[Loser, ...] | None:
    """Keep the worst losers in float until a bound holds, then let go again of those that it does not need.

    The number is doubled until the bound holds and then halved down to the fewest; about 2 log2(n) + k trials for k
    of n kept. What is left is the least in this sense: letting go of any one of them misses the bound.

    Args:
        losers: the worst first.
        holds: whether the bound holds with these kept in float; asked once for each set.

    Returns:
        Those that are kept, the worst first; None where the bound does not hold with all of them kept.
    """
    tried: dict[tuple[Loser, ...], bool] = {}

    def enough(kept: Sequence[Loser]) -> bool:
        key = tuple(kept)
        if key not in tried:
            tried[key] = holds(key)
        return tried[key]

    low, high = 0, 1
    while not enough(losers[:high]):
        if high >= len(losers):
            return None
        low, high = high, min(2 * high, len(losers))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(losers[:middle]) else (middle, high)
    kept = list(losers[:high])
    for loser in reversed(losers[:high]):
        fewer = [other for other in kept if other is not loser]
        if fewer and enough(fewer):
            kept = fewer
    return tuple(kept)


def _given(operators: Sequence[Operator], names: Collection[str]) -> set[str]:
    return {tensor for operator in operators if operator.name in names for tensor in operator.outputs}
