"""The circuit breaker, by example, by property, and against a model written another way."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.breaker import (
    CLOSED,
    JITTER_SHARE,
    Breaker,
    allow,
    failed,
    may_call,
    open_for_s,
    released,
    succeeded,
)
from outrider.policy import Policy
from support.effort import effort

NOW_S = 1000.0
POLICY = Policy(80.0, min_margin=0.5)
OPEN = Breaker(streak=5, recent=0b11111, opened=1, until_s=NOW_S + 1.0)
HALF_OPEN = Breaker(streak=5, recent=0b11111, opened=1, until_s=NOW_S - 1.0)
PROBING = dataclasses.replace(HALF_OPEN, probing=True)
unit = st.floats(0.0, 1.0)


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
TestBreakerMachine.settings = settings(max_examples=effort(60), stateful_step_count=40, deadline=None)
