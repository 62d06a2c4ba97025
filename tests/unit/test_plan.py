"""What goes from where, as rules over counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.passes.plan import (
    Group,
    by_ratio,
    climb,
    climb_to_macs,
    climb_to_share,
    global_ladder,
    layer_ladder,
    scan_ladder,
)
from outrider_runtimes.errors import ExportError


def group(name="a", units=64, step=8, importance=None):
    rising = tuple(float(i) for i in range(units))
    return Group(name=name, kind="channels", units=units, step=step, importance=importance or rising)


def originals(groups):
    return {item.name: item.units for item in groups}


groups_of = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 16)), min_size=1, max_size=5).map(
    lambda sizes: [group(f"g{i}", units, step) for i, (units, step) in enumerate(sizes)]
)


@pytest.mark.parametrize(
    ("units", "step", "counts"),
    [(32, 8, (24, 16, 8)), (20, 8, (16, 8)), (8, 8, ()), (5, 8, ()), (4, 1, (3, 2, 1)), (1, 1, ())],
)
def test_what_is_left_is_a_multiple_and_never_nothing(units, step, counts):
    assert group(units=units, step=step).counts == counts


@pytest.mark.parametrize(
    ("units", "step", "ratio", "left"),
    [
        (16, 8, 0.5, 8),
        (16, 8, 0.3, 8),
        (64, 8, 0.3, 40),
        (12, 1, 0.25, 9),
        (10, 1, 0.9, 1),
        (16, 8, 0.99, 8),
        (8, 8, 0.5, 8),
    ],
)
def test_a_ratio_is_rounded_down_to_a_multiple_and_leaves_a_step(units, step, ratio, left):
    groups = [group(units=units, step=step)]
    assert by_ratio(groups, originals(groups), ratio) == {"a": left}


def test_a_ratio_is_of_the_original_units_not_of_what_is_left():
    pruned = group(units=24)
    assert by_ratio([pruned], {"a": 32}, 0.5) == {"a": 16}
    assert by_ratio([pruned], {"a": 32}, 0.25) == {"a": 24}


@given(groups_of, st.floats(0.01, 0.99))
def test_every_rule_stays_inside_the_groups(groups, ratio):
    allowed = {item.name: {item.units, *item.counts} for item in groups}
    plans = [by_ratio(groups, originals(groups), ratio)]
    for ladder in (layer_ladder(groups, originals(groups)), global_ladder(groups)):
        assert [rung.score for rung in ladder] == sorted(rung.score for rung in ladder)
        assert sorted((r.group, -r.kept) for r in ladder) == sorted((g.name, -n) for g in groups for n in g.counts)
        plans += [climb(groups, ladder[:taken]) for taken in range(len(ladder) + 1)]
        for earlier, later in itertools.pairwise(plans[1:]):
            assert earlier.keys() == later.keys()
    for plan in plans:
        assert all(left in allowed[name] for name, left in plan.items())


@given(groups_of)
def test_rungs_of_a_group_are_taken_in_their_order(groups):
    for ladder in (
        global_ladder(groups),
        scan_ladder(groups, lambda item, kept, before: -float(kept)),
        scan_ladder(groups, lambda item, kept, before: float(kept)),
    ):
        for item in groups:
            assert [rung.kept for rung in ladder if rung.group == item.name] == list(item.counts)


def test_layers_lose_equal_shares_one_rounding_step_at_a_time():
    groups = [group("wide", 64), group("narrow", 16)]
    kept = [(rung.group, rung.kept) for rung in layer_ladder(groups, originals(groups))]
    assert kept[:5] == [("wide", 56), ("wide", 48), ("wide", 40), ("wide", 32), ("narrow", 8)]


def test_the_global_rule_takes_the_least_important_units_first():
    weak = group("weak", 4, 1, (0.1, 0.2, 0.3, 3.4))
    strong = group("strong", 4, 1, (0.9, 1.0, 1.0, 1.1))
    ladder = global_ladder([strong, weak])
    assert [(rung.group, rung.kept) for rung in ladder[:3]] == [("weak", 3), ("weak", 2), ("weak", 1)]
    # Three of eight units are the least share of 0.3 or more.
    taken = climb_to_share([strong, weak], ladder, {"weak": 4, "strong": 4}, 0.3)
    assert climb([strong, weak], ladder[:taken]) == {"strong": 4, "weak": 1}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.floats(0.0, 1.0))
def test_macs_are_reached_within_one_rung(costs, share):
    total = sum(costs) + 1
    rungs = layer_ladder([group(units=len(costs) + 1, step=1)], {"a": len(costs) + 1})
    asked = []

    def macs_after(taken):
        asked.append(taken)
        return total - sum(costs[:taken])

    allowed = max(1.0, total * (1.0 - share))
    taken = climb_to_macs(rungs, macs_after, allowed)
    assert macs_after(taken) <= allowed
    assert taken == 0 or macs_after(taken - 1) > allowed
    assert len(asked) <= 10


def test_macs_that_cannot_be_reached_are_refused_with_what_can():
    with pytest.raises(ExportError, match="40 MACs are left when all that can go is gone, at most 30"):
        climb_to_macs(layer_ladder([group()], {"a": 64}), lambda taken: 100 if not taken else 40, 30.0)
