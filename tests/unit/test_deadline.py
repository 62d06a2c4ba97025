"""Deadlines, on a clock that only the test moves."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded
from support.clocks import ManualClock


def test_a_deadline_runs_out_at_its_time():
    clock = ManualClock(100.0)
    deadline = Deadline.after_ms(500.0, clock=clock)
    assert deadline.at_s == 100.5
    assert deadline.remaining_s() == deadline.timeout_s() == 0.5
    clock.now_s = 100.25
    assert not deadline.passed
    assert deadline.remaining_s() == 0.25
    clock.now_s = 100.5
    assert deadline.passed
    assert deadline.remaining_s() == 0.0
    with pytest.raises(DeadlineExceeded):
        deadline.timeout_s()


def test_a_deadline_of_none_never_runs_out():
    clock = ManualClock(100.0)
    deadline = Deadline.after_ms(None, clock=clock)
    clock.now_s = 1e300
    assert not deadline.passed
    assert deadline.remaining_s() == math.inf
    assert deadline.timeout_s() is None


@pytest.mark.parametrize(
    "bad",
    [0, 0.0, -1, -math.inf, math.nan, 1e300, 10**400, "5", [], True, False, 5j, np.ones(2), Decimal("NaN")],
)
def test_what_is_not_a_number_above_zero_is_refused(bad):
    with pytest.raises(ConfigError, match="deadline_ms"):
        Deadline.after_ms(bad)


def test_a_single_float_does_not_lend_its_precision_to_the_clock():
    clock = ManualClock(1e7 + 0.25)
    assert Deadline.after_ms(np.float32(50.0), clock=clock).at_s == 1e7 + 0.3  # type: ignore[arg-type]


def test_a_timeout_is_a_timeout_error():
    assert issubclass(DeadlineExceeded, TimeoutError)


@given(st.floats(1e-3, 1e9), st.floats(0, 1e9))
def test_passed_and_no_time_left_are_the_same(milliseconds, later_s):
    clock = ManualClock(100.0)
    deadline = Deadline.after_ms(milliseconds, clock=clock)
    clock.now_s += later_s
    assert deadline.passed == (deadline.remaining_s() == 0.0)
    assert 0.0 <= deadline.remaining_s() <= milliseconds / 1000.0 + 1e-9
