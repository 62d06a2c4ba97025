"""The policy: tables of decisions, properties of them, and the breaker against a model written another way."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.policy import (
    CLOSED,
    JITTER_SHARE,
    Breaker,
    Policy,
    State,
    allow,
    failed,
    may_call,
    obstacle,
    open_for_s,
    released,
    review,
    route,
    succeeded,
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
        ("obey_certified", 1),
        ("output", 3),
        ("offload_when_queued", 1),
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
def test_route(given_state, expected):
    decision = route(POLICY, given_state, NOW_S)
    assert (decision.side, decision.reason, decision.refresh_edge) == expected


def test_the_queue_reason_can_be_switched_off():
    overloaded = state(edge_ms=200.0, cloud_ms=20.0)
    assert route(POLICY, overloaded, NOW_S).side == "cloud"
    assert route(Policy(80.0, offload_when_queued=False), overloaded, NOW_S).side == "edge"


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
def test_review(given_state, margin, expected):
    verdict = review(POLICY, given_state, margin, NOW_S)
    assert (verdict.action, verdict.reason) == expected


def test_a_margin_of_zero_judges_nothing():
    assert review(Policy(80.0), state(), 0.0, NOW_S).reason == "edge"


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
states = st.builds(
    State,
    deadline_s=times,
    edge_ms=millis,
    edge_tried_s=times,
    cloud_ms=millis,
    cloud_tried_s=times,
    breaker=breakers,
    mismatch=st.booleans(),
    certified=st.none() | st.floats(0.0, 1.0),
    private=st.booleans(),
    spent=st.booleans(),
)
policies = st.builds(
    Policy,
    st.floats(10.0, 1000.0),
    min_margin=st.floats(0.0, 1.0),
    offload_when_queued=st.booleans(),
    reserve_ms=st.floats(0.0, 9.0),
)
unit = st.floats(0.0, 1.0)
order = {"keep": 0, "degrade": 1, "offload": 2}


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
    faster = dataclasses.replace(given_state, edge_ms=max(0.0, given_state.edge_ms - faster_by_ms))
    if route(policy, given_state, now_s).side == "edge":
        assert route(policy, faster, now_s).side == "edge"


@given(policies, states, unit, times)
def test_the_cloud_is_never_chosen_over_an_obstacle(policy, given_state, margin, now_s):
    blocked = obstacle(policy, given_state, now_s)
    if blocked is not None:
        assert route(policy, given_state, now_s).side != "cloud"
        assert review(policy, given_state, margin, now_s).action != "offload"


# --- the breaker, by example


def test_five_failures_in_a_row_open_it():
    breaker = CLOSED
    for _ in range(4):
        breaker = failed(POLICY, breaker, NOW_S, 0.0)
        assert may_call(breaker, NOW_S)
    breaker = failed(POLICY, breaker, NOW_S, 0.0)
    assert breaker.until_s == NOW_S + 5.0
    assert not may_call(breaker, NOW_S + 4.999)
    assert may_call(breaker, NOW_S + 5.0)


def test_half_of_the_last_ten_open_it_though_never_two_in_a_row():
    breaker = CLOSED
    for _ in range(4):
        breaker = succeeded(POLICY, failed(POLICY, breaker, NOW_S, 0.0))
        assert breaker.until_s is None
    breaker = failed(POLICY, breaker, NOW_S, 0.0)
    assert breaker.until_s is not None


def test_one_probe_at_a_time_and_its_success_closes():
    first, probing = allow(HALF_OPEN, NOW_S)
    second, unchanged = allow(probing, NOW_S)
    assert (first, second) == (True, False)
    assert unchanged is probing
    assert succeeded(POLICY, probing) is CLOSED


def test_failed_probes_double_the_wait_up_to_the_cap():
    breaker, waits_s = HALF_OPEN, []
    now_s = NOW_S
    for _ in range(6):
        allowed, breaker = allow(breaker, now_s)
        assert allowed
        breaker = failed(POLICY, breaker, now_s, 0.0)
        waits_s.append(breaker.until_s - now_s)
        now_s = breaker.until_s
    assert waits_s == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_a_probe_that_said_nothing_leaves_the_next_one_free():
    assert released(PROBING) == HALF_OPEN
    assert released(CLOSED) is CLOSED


def test_what_was_under_way_when_it_opened_changes_nothing():
    assert succeeded(POLICY, OPEN) is OPEN
    assert failed(POLICY, OPEN, NOW_S, 1.0) is OPEN


def test_a_healthy_cloud_costs_no_allocation():
    assert succeeded(POLICY, CLOSED) is CLOSED
    assert allow(CLOSED, NOW_S) == (True, CLOSED)


@given(st.integers(0, 10_000), unit)
def test_the_wait_is_bounded_whatever_happened_before(opened, jitter):
    wait_s = open_for_s(POLICY, opened, jitter)
    assert POLICY.open_s <= wait_s <= POLICY.open_max_s * (1.0 + JITTER_SHARE)


# --- the breaker, against a list of outcomes and a flag


class BreakerMachine(RuleBasedStateMachine):
    """Random calls, ends and waits. The model keeps plain lists; the breaker must agree at each step."""

    @initialize(row=st.integers(1, 6), window=st.integers(1, 12))
    def begin(self, row, window):
        self.policy = Policy(80.0, failures_in_a_row=row, window=window, open_s=5.0, open_max_s=60.0)
        self.breaker = CLOSED
        self.now_s = 0.0
        self.outcomes: list[bool] = []
        self.phase = "closed"
        self.opens = 0
        self.under_way = 0

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds):
        self.now_s += seconds

    @rule()
    def call(self):
        expected = self.phase == "closed" or (self.phase == "open" and self.now_s >= self.breaker.until_s)
        assert may_call(self.breaker, self.now_s) == expected
        allowed, self.breaker = allow(self.breaker, self.now_s)
        assert allowed == expected
        if allowed:
            self.under_way += 1
            self.phase = "probing" if self.phase == "open" else self.phase

    @precondition(lambda self: self.under_way > 0)
    @rule()
    def succeed(self):
        self.under_way -= 1
        self.breaker = succeeded(self.policy, self.breaker)
        if self.phase == "closed":
            self.outcomes.append(False)
        elif self.phase == "probing":
            self.phase, self.outcomes, self.opens = "closed", [], 0

    @precondition(lambda self: self.under_way > 0)
    @rule(jitter=unit)
    def fail(self, jitter):
        self.under_way -= 1
        self.breaker = failed(self.policy, self.breaker, self.now_s, jitter)
        if self.phase == "open":
            return
        self.outcomes.append(True)
        if self.phase == "probing" or self._too_many():
            wait_s = self.breaker.until_s - self.now_s
            base_s = min(5.0 * 2**self.opens, 60.0)
            assert base_s * 0.999 <= wait_s <= base_s * 1.251
            self.phase, self.opens = "open", self.opens + 1

    @precondition(lambda self: self.under_way > 0)
    @rule()
    def say_nothing(self):
        self.under_way -= 1
        self.breaker = released(self.breaker)
        self.phase = "open" if self.phase == "probing" else self.phase

    @invariant()
    def it_agrees(self):
        if not hasattr(self, "phase"):
            return
        assert (self.breaker.until_s is None) == (self.phase == "closed")
        assert self.breaker.probing == (self.phase == "probing")
        assert self.breaker.opened == self.opens

    def _too_many(self) -> bool:
        row, window = self.policy.failures_in_a_row, self.policy.window
        in_a_row = len(self.outcomes) >= row and all(self.outcomes[-row:])
        return in_a_row or sum(self.outcomes[-window:]) * 2 >= window


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
