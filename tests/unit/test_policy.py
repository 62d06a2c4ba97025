"""The policy: tables of decisions, and properties of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.breaker import Breaker
from outrider.policy import (
    FIRST,
    OBSTACLES,
    RESCUES,
    STRAINS,
    SWITCHES,
    UNKNOWN,
    Policy,
    State,
    Strain,
    barred,
    obstacle,
    rescue,
    review,
    route,
    strained,
)
from outrider_runtimes.errors import ConfigError

NOW_S = 1000.0
POLICY = Policy(80.0, min_margin=0.5)
OPEN = Breaker(streak=5, recent=0b11111, opened=1, until_s=NOW_S + 1.0)
HALF_OPEN = Breaker(streak=5, recent=0b11111, opened=1, until_s=NOW_S - 1.0)
PROBING = dataclasses.replace(HALF_OPEN, probing=True)


def state(left_ms: float = 80.0, **changes: object) -> State:
    return State(deadline_s=NOW_S + left_ms / 1000.0, **changes)  # type: ignore[arg-type]


# --- the policy's own fields


def test_the_deadline_may_be_given_by_position_and_the_rest_only_by_name():
    assert Policy(80.0) == Policy(deadline_ms=80.0)
    with pytest.raises(TypeError):
        Policy(80.0, 0.5)  # type: ignore[misc]


def test_no_deadline_is_said_not_assumed():
    assert Policy(None).deadline_ms is None
    with pytest.raises(TypeError):
        Policy()  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers():
    policy = Policy(np.float32(80), min_margin=np.float32(0.5), hedge_after_ms=np.int64(5))
    assert policy == Policy(80.0, min_margin=0.5, hedge_after_ms=5.0)
    assert {type(value) for value in (policy.deadline_ms, policy.min_margin, policy.hedge_after_ms)} == {float}
    with pytest.raises(ConfigError, match="deadline_ms"):
        Policy(np.float32("nan"))


def test_a_deadline_as_short_as_the_reserve_is_refused_with_a_reserve_that_fits():
    with pytest.raises(ConfigError, match=r"reserve_ms is 2\.0, expected below deadline_ms, 1\.0") as caught:
        Policy(1.0)
    assert caught.value.hint == "reserve_ms=0.25"
    assert Policy(1.0, reserve_ms=0.25).reserve_ms == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("private", 1),
        ("deadline_ms", 0.0),
        ("deadline_ms", -1),
        ("deadline_ms", math.nan),
        ("deadline_ms", math.inf),
        ("deadline_ms", "80"),
        ("deadline_ms", 10**400),
        ("deadline_ms", True),
        ("min_margin", -0.1),
        ("min_margin", 1.1),
        ("min_margin", math.nan),
        ("hedge_after_ms", -1.0),
        ("hedge_after_ms", math.nan),
        *((switch, value) for switch in SWITCHES for value in (1, None)),
        ("output", 3),
        ("hot_c", "hot"),
        ("hot_c", math.nan),
        ("low_battery", 1.1),
        ("low_battery", 20),
        ("audit_share", -0.1),
        ("audit_share", None),
        ("audit_allowed", 0.0),
        ("audit_allowed", 1.0),
        ("audit_allowed", "1 %"),
        ("reserve_ms", -1.0),
        ("reserve_ms", 80.0),
        ("failures_in_a_row", 0),
        ("failures_in_a_row", 2.5),
        ("window", 0),
        ("window", 5000),
        ("open_s", 0.0),
        ("open_max_s", 1.0),
        ("open_max_s", math.inf),
    ],
)
def test_a_bad_field_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"policy\.{name} is "):
        Policy(**{"deadline_ms": 80.0, name: value})


# --- route


@pytest.mark.parametrize(
    ("given_state", "expected"),
    [
        (state(), ("edge", "edge", False)),
        (state(edge_ms=79.0), ("edge", "edge", False)),
        (state(edge_ms=81.0), ("cloud", "queue", True)),  # nobody knows whether the cloud is faster: find out
        (state(edge_ms=81.0, cloud_tried_s=NOW_S - 1), ("edge", "edge", False)),
        (state(edge_ms=81.0, cloud_ms=81.0, cloud_tried_s=NOW_S - 1), ("edge", "edge", False)),
        (state(edge_ms=81.0, cloud_ms=81.0, cloud_tried_s=NOW_S - 6), ("cloud", "queue", True)),
        (state(edge_ms=81.0, cloud_ms=20.0, edge_tried_s=NOW_S - 1), ("cloud", "queue", False)),
        (state(edge_ms=81.0, cloud_ms=20.0, edge_tried_s=NOW_S - 6), ("cloud", "queue", True)),
        (state(edge_ms=81.0, cloud_ms=20.0, breaker=OPEN), ("edge", "edge", False)),
        (state(edge_ms=81.0, cloud_ms=20.0, breaker=PROBING), ("edge", "edge", False)),
        (state(edge_ms=81.0, cloud_ms=20.0, mismatch=True), ("edge", "edge", False)),
        (state(left_ms=0.0), ("refuse", "no_time", False)),
        (state(left_ms=-5.0, edge_ms=1.0, cloud_ms=1.0), ("refuse", "no_time", False)),
        (State(deadline_s=math.inf, edge_ms=1e9, cloud_ms=1.0), ("edge", "edge", False)),
    ],
)
def test_route_decides_by_the_time_the_board_and_the_queue(given_state, expected):
    decision = route(POLICY, given_state, NOW_S)
    assert (decision.side, decision.reason, decision.refresh_edge) == expected


def test_the_queue_reason_can_be_switched_off():
    overloaded = state(edge_ms=200.0, cloud_ms=20.0)
    assert route(POLICY, overloaded, NOW_S).side == "cloud"
    assert route(Policy(80.0, offload_when_queued=False), overloaded, NOW_S).side == "edge"


HOT = Strain(celsius=81.0)
SPARED = {
    "hot": HOT,
    "throttled": Strain(celsius=70.0, throttled=True),
    "low_power": Strain(undervolted=True, throttled=True),
}
SWITCHED_OFF = {
    "hot": {"hot_c": None},
    "throttled": {"offload_when_throttled": False, "hot_c": None},
    "low_power": {"offload_when_low_power": False, "offload_when_throttled": False},
}


@pytest.mark.parametrize("reason", STRAINS)
def test_a_strained_board_is_spared_where_the_cloud_leaves_the_edge_its_time(reason):
    spared = state(edge_ms=30.0, cloud_ms=40.0, cloud_tried_s=NOW_S, strain=SPARED[reason])
    assert route(POLICY, spared, NOW_S) is FIRST[reason]
    assert route(Policy(80.0, **SWITCHED_OFF[reason]), spared, NOW_S).reason == "edge"
    too_slow = dataclasses.replace(spared, cloud_ms=50.0)  # with the edge's 30 and the reserve, no time is left
    assert route(POLICY, too_slow, NOW_S).reason == "edge"
    assert route(POLICY, dataclasses.replace(too_slow, cloud_tried_s=NOW_S - 6), NOW_S).reason == reason  # too old
    unmeasured = route(POLICY, dataclasses.replace(spared, edge_ms=None), NOW_S)
    assert (unmeasured.reason, unmeasured.refresh_edge) == (reason, True)
    for obstacle_ in ({"private": True}, {"spent": True}, {"mismatch": True}, {"breaker": OPEN}):
        assert route(POLICY, dataclasses.replace(spared, **obstacle_), NOW_S).reason == "edge"


@pytest.mark.parametrize(
    ("strain", "reason"),
    [
        (UNKNOWN, None),
        (Strain(celsius=79.9), None),
        (Strain(celsius=80.0), "hot"),
        (Strain(celsius=90.0, throttled=True), "throttled"),
        (Strain(celsius=90.0, throttled=True, undervolted=True), "low_power"),
        (Strain(battery=0.21), None),
        (Strain(battery=0.2), "low_power"),
        (Strain(battery=0.0), "low_power"),
    ],
)
def test_what_strains_the_board_most_is_the_reason(strain, reason):
    assert strained(POLICY, strain) == reason


def test_a_deadline_that_only_the_cloud_can_meet_goes_before_sparing_the_board():
    both = state(edge_ms=100.0, edge_tried_s=NOW_S, cloud_ms=70.0, cloud_tried_s=NOW_S, strain=HOT)
    assert route(POLICY, both, NOW_S).reason == "queue"


def test_a_task_of_the_cloud_goes_there_and_is_a_stopgap_where_it_cannot():
    task = state(edge_ms=30.0, cloud_only=True)
    assert route(POLICY, task, NOW_S) is FIRST["cloud_only"]
    assert route(Policy(80.0, obey_cloud_only=False), task, NOW_S).reason == "edge"
    for change, reason in (
        ({"private": True}, "private"),
        ({"spent": True}, "budget_spent"),
        ({"mismatch": True}, "interface_mismatch"),
        ({"breaker": OPEN}, "circuit_open"),
        ({"edge_ms": 79.0}, "no_time_left"),
    ):
        stopgap = route(POLICY, dataclasses.replace(task, **change), NOW_S)
        assert (stopgap.side, stopgap.reason) == ("edge", reason)


@pytest.mark.parametrize("reason", RESCUES)
def test_where_the_edge_has_no_answer_the_cloud_is_asked_unless_that_is_switched_off(reason):
    assert rescue(POLICY, state(), reason, NOW_S)
    assert not rescue(Policy(80.0, **{RESCUES[reason]: False}), state(), reason, NOW_S)
    assert not rescue(POLICY, state(private=True), reason, NOW_S)
    assert not rescue(POLICY, state(left_ms=0.0), reason, NOW_S)


# --- review


@pytest.mark.parametrize(
    ("given_state", "margin", "expected"),
    [
        (state(), 0.9, ("keep", "confident")),
        (state(), 0.5, ("keep", "confident")),
        (state(), 0.49, ("offload", "uncertain")),
        (state(), math.nan, ("offload", "uncertain")),
        (state(), None, ("keep", "edge")),
        (state(breaker=OPEN), 0.9, ("keep", "confident")),
        (state(breaker=OPEN), 0.1, ("degrade", "circuit_open")),
        (state(breaker=HALF_OPEN), 0.1, ("offload", "uncertain")),
        (state(breaker=PROBING), 0.1, ("degrade", "circuit_open")),
        (state(mismatch=True), 0.1, ("degrade", "interface_mismatch")),
        (state(left_ms=2.0), 0.1, ("degrade", "no_time_left")),  # all of it is kept back
        (state(left_ms=20.0, cloud_ms=30.0, cloud_tried_s=NOW_S - 1), 0.1, ("degrade", "no_time_left")),
        (state(left_ms=20.0, cloud_ms=30.0, cloud_tried_s=NOW_S - 6), 0.1, ("offload", "uncertain")),  # too old
        (state(left_ms=20.0, cloud_ms=15.0, cloud_tried_s=NOW_S - 1), 0.1, ("offload", "uncertain")),
        (State(deadline_s=math.inf, cloud_ms=1e9, cloud_tried_s=NOW_S), 0.1, ("offload", "uncertain")),
    ],
)
def test_review_keeps_what_is_sure_enough_and_says_why_else(given_state, margin, expected):
    verdict = review(POLICY, given_state, margin, NOW_S)
    assert (verdict.action, verdict.reason) == expected


def test_a_margin_of_zero_judges_nothing():
    assert review(Policy(80.0), state(), 0.0, NOW_S).reason == "edge"


def test_what_was_certified_of_the_answer_is_obeyed_unless_the_policy_has_its_own_rule():
    certified = Policy(80.0)
    assert review(certified, state(), 0.4, NOW_S, certified=0.5).reason == "uncertain"
    assert review(certified, state(), 0.5, NOW_S, certified=0.5).reason == "confident"
    assert review(certified, state(), 0.4, NOW_S).reason == "edge"
    assert review(Policy(80.0, obey_certified=False), state(), 0.4, NOW_S, certified=0.5).reason == "edge"
    assert review(POLICY, state(), 0.6, NOW_S, certified=0.9).reason == "confident"


def test_a_share_of_the_confident_answers_is_audited():
    auditing = Policy(80.0, min_margin=0.5, audit_share=0.1)
    assert review(auditing, state(), 0.9, NOW_S, draw=0.099).action == "audit"
    assert review(auditing, state(), 0.9, NOW_S, draw=0.1).reason == "confident"
    assert review(auditing, state(), 0.1, NOW_S, draw=0.0).reason == "uncertain"
    assert review(auditing, state(left_ms=1.0), 0.9, NOW_S, draw=0.0).action == "audit"  # nobody waits for it
    assert review(POLICY, state(), 0.9, NOW_S, draw=0.0).reason == "confident"
    for barrier in ({"private": True}, {"spent": True}, {"mismatch": True}, {"breaker": OPEN}):
        assert review(auditing, state(**barrier), 0.9, NOW_S, draw=0.0).reason == "confident"


# --- properties of both

times = st.floats(-1000.0, 1000.0)
millis = st.one_of(st.none(), st.floats(0.0, 1000.0))
breakers = st.builds(
    Breaker,
    streak=st.integers(0, 10),
    recent=st.integers(0, 1023),
    opened=st.integers(0, 5),
    until_s=st.one_of(st.none(), times),
    probing=st.booleans(),
)
strains = st.just(UNKNOWN) | st.builds(
    Strain,
    celsius=st.none() | st.floats(-40.0, 120.0),
    throttled=st.booleans(),
    undervolted=st.booleans(),
    battery=st.none() | st.floats(0.0, 1.0),
)
states = st.builds(
    State,
    deadline_s=times,
    edge_ms=millis,
    edge_tried_s=times,
    cloud_ms=millis,
    cloud_tried_s=times,
    breaker=breakers,
    mismatch=st.booleans(),
    private=st.booleans(),
    spent=st.booleans(),
    cloud_only=st.booleans(),
    strain=strains,
)
policies = st.builds(
    Policy,
    st.floats(10.0, 1000.0),
    min_margin=st.floats(0.0, 1.0),
    reserve_ms=st.floats(0.0, 9.0),
    hot_c=st.none() | st.floats(40.0, 100.0),
    low_battery=st.floats(0.0, 1.0),
    audit_share=st.floats(0.0, 1.0),
    **{switch: st.booleans() for switch in SWITCHES},
)
unit = st.floats(0.0, 1.0)
order = {"keep": 0, "audit": 0, "degrade": 1, "offload": 2}


@given(policies, states, unit, times)
def test_the_same_question_has_the_same_answer_and_it_is_a_shared_constant(policy, given_state, margin, now_s):
    assert route(policy, given_state, now_s) is route(policy, given_state, now_s)
    assert review(policy, given_state, margin, now_s) is review(policy, given_state, margin, now_s)


@given(policies, states, unit, unit, times)
def test_a_lower_margin_never_turns_an_offload_into_a_keep(policy, given_state, first, second, now_s):
    low, high = sorted((first, second))
    less, more = (review(policy, given_state, margin, now_s).action for margin in (low, high))
    assert order[less] >= order[more]


@given(policies, states, unit, times, st.floats(0.0, 1000.0))
def test_more_time_never_takes_an_offload_away(policy, given_state, margin, now_s, more_s):
    later = dataclasses.replace(given_state, deadline_s=given_state.deadline_s + more_s)
    if review(policy, given_state, margin, now_s).action == "offload":
        assert review(policy, later, margin, now_s).action == "offload"


@given(policies, states, times, st.floats(0.0, 1000.0))
def test_a_faster_edge_never_sends_a_request_away(policy, given_state, now_s, faster_by_ms):
    if given_state.edge_ms is None:
        return
    idle = dataclasses.replace(given_state, cloud_only=False, strain=UNKNOWN)
    faster = dataclasses.replace(idle, edge_ms=max(0.0, given_state.edge_ms - faster_by_ms))
    if route(policy, idle, now_s).side == "edge":
        assert route(policy, faster, now_s).side == "edge"


@given(policies, states, unit, times)
def test_the_cloud_is_never_chosen_over_an_obstacle(policy, given_state, margin, now_s):
    blocked = obstacle(policy, given_state, now_s)
    if blocked is not None:
        assert route(policy, given_state, now_s).side != "cloud"
        assert review(policy, given_state, margin, now_s).action != "offload"


@given(policies, states, unit, unit, times)
def test_what_is_private_never_leaves_whatever_else_holds(policy, given_state, margin, draw, now_s):
    private = dataclasses.replace(given_state, private=True)
    assert route(policy, private, now_s).side != "cloud"
    assert review(policy, private, margin, now_s, certified=0.5, draw=draw).action in ("keep", "degrade")
    assert not any(rescue(policy, private, reason, now_s) for reason in RESCUES)


@given(policies, states, times)
def test_a_reason_that_is_switched_off_is_never_the_reason(policy, given_state, now_s):
    decision = route(policy, given_state, now_s)
    off = {"queue": {"offload_when_queued": False}, "cloud_only": {"obey_cloud_only": False}, **SWITCHED_OFF}
    for reason, fields in off.items():
        assert route(dataclasses.replace(policy, **fields), given_state, now_s).reason != reason
    if decision.side == "cloud":
        assert decision.reason in off
    else:
        assert decision.reason in ("edge", "no_time", *OBSTACLES)


@given(policies, states, times)
def test_with_every_reason_off_everything_stays(policy, given_state, now_s):
    off = dataclasses.replace(policy, hot_c=None, **dict.fromkeys(SWITCHES, False))
    assert route(off, given_state, now_s).side in ("edge", "refuse")
    assert not any(rescue(off, given_state, reason, now_s) for reason in RESCUES)


@given(policies, states, times)
def test_a_cloud_that_is_asked_though_the_edge_could_leaves_it_its_time(policy, given_state, now_s):
    decision = route(policy, given_state, now_s)
    left_ms = (given_state.deadline_s - now_s) * 1000.0
    if decision.keep_edge:
        assert given_state.edge_ms is not None
        assert left_ms > given_state.edge_ms + policy.reserve_ms
    if decision.reason in FIRST:
        assert barred(given_state, now_s) is None


@given(policies, states, unit, unit, times)
def test_only_confident_answers_are_audited_and_never_against_a_barrier(policy, given_state, margin, draw, now_s):
    verdict = review(policy, given_state, margin, now_s, certified=0.5, draw=draw)
    if verdict.action == "audit":
        assert draw < policy.audit_share and barred(given_state, now_s) is None
        assert margin >= (policy.min_margin or 0.5)
    unaudited = review(policy, given_state, margin, now_s, certified=0.5, draw=1.0)
    assert (unaudited.action == "keep") == (verdict.action in ("keep", "audit"))
    assert unaudited.action != "audit"
