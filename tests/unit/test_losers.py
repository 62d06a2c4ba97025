"""The search for what to keep in float, on networks of names where rounding a tensor costs a known error."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.convert.losers import Loser, find_losers, keep_until, pairs_of
from outrider_exporters.convert.operators import Operator


def layer(name: str, takes: str, gives: str, *, weighted: bool = True) -> Operator:
    return Operator(name=name, kind="", inputs=tuple(takes.split()), outputs=(gives,), weighted=weighted)


def chain(length: int) -> list[Operator]:
    """`layer 0`, `relu 0`, `layer 1`, ...: tensor `i` goes into layer i, `ai` into relu i."""
    operators = []
    for at in range(length):
        operators.append(layer(f"layer{at}", f"{at}", f"a{at}"))
        operators.append(layer(f"relu{at}", f"a{at}", f"{at + 1}", weighted=False))
    return operators


def touched(operators: list[Operator], quantized) -> set[str]:
    """The tensors that are rounded: whatever a quantized operator takes or gives."""
    return {t for o in operators if o.name in quantized for t in (*o.inputs, *o.outputs)}


def error_with(operators: list[Operator], noise: dict[str, float]):
    return lambda quantized: math.fsum(noise.get(t, 0.001) for t in sorted(touched(operators, quantized)))


SKIP = [
    layer("stem", "x", "a"),
    layer("relu", "a", "b", weighted=False),
    layer("left", "b", "c"),
    layer("sum", "b c", "d", weighted=False),
    layer("head", "d", "y"),
]


def test_pairs_go_over_what_has_no_weights():
    assert pairs_of(chain(3)) == (("layer0", "layer1"), ("layer1", "layer2"))
    assert pairs_of(SKIP) == (("stem", "left"), ("stem", "head"), ("left", "head"))
    assert pairs_of([layer("only", "x", "y")]) == (("only",),)
    assert pairs_of([]) == ()


def test_both_sides_of_a_hard_tensor_come_first():
    operators = chain(6)
    losers = find_losers(operators, error_with(operators, {"3": 1.0}))
    assert {loser.label for loser in losers[:2]} == {"layer2", "layer3"}
    assert losers[1].error > 1.0 > 0.1 > losers[2].error
    assert losers[0].names in (("layer2", "relu2"), ("layer3", "relu3"))
    assert len(losers) == 6


def test_neither_of_two_neighbours_alone_restores_it():
    operators = chain(6)
    error = error_with(operators, {"3": 1.0})
    everything = {o.name for o in operators}
    for alone in ("2", "3"):
        assert error(everything - {f"layer{alone}", f"relu{alone}"}) > 1.0
    kept = keep_until(
        find_losers(operators, error),
        lambda losers: error(everything - {name for loser in losers for name in loser.names}) < 0.1,
    )
    assert {loser.label for loser in kept} == {"layer2", "layer3"}


@given(st.integers(2, 12), st.data())
def test_exactly_those_that_touch_a_hard_tensor_are_kept(length, data):
    operators = chain(length)
    hard = data.draw(st.sets(st.integers(0, length), max_size=2).map(lambda s: {str(t) for t in s}))
    guilty = {o.name for o in operators if o.weighted and hard.intersection(o.inputs)}
    guilty |= {f"layer{int(t) - 1}" for t in hard if t != "0"}
    error = error_with(operators, dict.fromkeys(hard, 1.0))
    everything = {o.name for o in operators}

    def holds(losers):
        return error(everything - {name for loser in losers for name in loser.names}) < 0.5

    kept = keep_until(find_losers(operators, error), holds)
    assert kept is not None
    if hard:
        assert {loser.label for loser in kept} == guilty


def numbered(count: int) -> list[Loser]:
    return [Loser(label=str(at), names=(str(at),), error=float(count - at)) for at in range(count)]


@given(st.integers(1, 40), st.data())
def test_the_fewest_are_kept_in_few_trials(count, data):
    needed = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    asked = []

    def holds(losers):
        asked.append(tuple(losers))
        return needed <= {int(loser.label) for loser in losers}

    kept = keep_until(numbered(count), holds)
    assert [int(loser.label) for loser in kept] == sorted(needed)
    assert len(set(asked)) == len(asked)  # a trial is a conversion: none is made twice
    assert len(asked) <= 2 * math.log2(count) + 3 + max(needed)


@given(st.integers(0, 20))
def test_a_bound_that_nothing_meets(count):
    assert keep_until(numbered(count), lambda _: False) is None


def test_a_bound_that_gets_worse_again():
    """More in float is not always better; what is returned meets the bound all the same."""
    good = ({"0", "1", "2"}, {"0", "2"})
    kept = keep_until(numbered(3), lambda losers: {loser.label for loser in losers} in good)
    assert {loser.label for loser in kept} == {"0", "2"}
