"""The time that is left, told from the time that passed, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.passes import Progress
from outrider_exporters.progress import SOONEST_S, duration_text, with_time_left
from support.clocks import ManualClock


def told(events):
    """What is shown of (seconds since the event before, step, done, total)."""
    clock, shown = ManualClock(), []
    show = with_time_left(shown.append, clock=clock)
    for wait, step, done, total in events:
        clock.now_s += wait
        show(Progress(step=step, done=done, total=total))
    return [progress.left_s for progress in shown]


def test_the_rest_is_as_fast_as_what_was_done():
    events = [(0, "distill", 0, 4), (10, "distill", 1, 4), (20, "distill", 2, 4), (0, "distill", 4, 4)]
    assert told(events) == [None, None, pytest.approx(30.0), None]


def test_one_tick_says_nothing_of_the_next():
    assert told([(0, "scan", 0, 9), (30, "scan", 1, 9)]) == [None, None]
    assert told([(0, "scan", 0, 9), (30, "scan", 5, 9)]) == [None, None]


def test_a_step_that_begins_with_its_first_unit_done_is_timed_from_there():
    assert told([(0, "distill", 1, 4), (5, "distill", 2, 4), (5, "distill", 3, 4)]) == [None, None, pytest.approx(5.0)]


def test_a_message_within_a_unit_counts_down_and_stops_where_the_unit_overruns():
    begun = [(0, "scan", 0, 4), (4, "scan", 1, 4), (4, "scan", 2, 4)]
    assert told([*begun, (1, "scan", 2, 4), (2, "scan", 2, 4), (60, "scan", 2, 4)])[2:] == [8.0, 7.0, 5.0, 4.0]
    assert told([*begun, (4, "scan", 3, 4), (3, "scan", 3, 4), (60, "scan", 3, 4)])[3:] == [4.0, 1.0, None]


def test_steps_within_steps_are_timed_apart():
    events = [(0, "passes", 0, 3), (0, "scan", 0, 10), (2, "scan", 1, 10), (2, "scan", 2, 10), (6, "passes", 1, 3)]
    assert told([*events, (10, "passes", 2, 3)])[3:] == [pytest.approx(16.0), None, pytest.approx(10.0)]


def test_a_step_that_starts_again_begins_with_what_was_known_of_it():
    first = [(0, "distill", 0, 2), (5, "distill", 1, 2), (5, "distill", 2, 2)]
    again = [(60, "distill", 0, 4), (3, "distill", 1, 4), (3, "distill", 2, 4)]
    assert told([*first, *again])[3:] == [
        pytest.approx(4 * 5.0),
        pytest.approx(3 * (5.0 + 3.0) / 2),
        pytest.approx(2 * (5.0 + 6.0) / 3),
    ]


def test_what_was_too_little_to_go_by_is_not_known_the_next_time():
    assert told([(0, "distill", 1, 2), (50, "distill", 2, 2), (5, "distill", 0, 2), (3, "distill", 1, 2)]) == [None] * 4


def test_nothing_is_said_too_soon_or_of_a_single_unit():
    soon = SOONEST_S / 3
    assert told([(0, "convert", 0, 9), (soon, "convert", 1, 9), (soon, "convert", 2, 9)]) == [None] * 3
    assert told([(60, "bundle", 0, 1)]) == [None]


def test_what_the_step_says_itself_stays():
    clock, shown = ManualClock(), []
    with_time_left(shown.append, clock=clock)(Progress(step="fit", done=0, total=2, left_s=7.0))
    assert shown[0].left_s == 7.0


@given(st.lists(st.tuples(st.floats(-5, 100), st.integers(0, 20)), max_size=20))
def test_an_estimate_is_above_zero_whatever_the_clock_and_the_counts_do(steps):
    assert all(left is None or left > 0.0 for left in told([(wait, "x", done, 20) for wait, done in steps]))


@given(st.floats(1.0, 100.0), st.integers(3, 50))
def test_of_equal_units_every_estimate_is_right(unit_s, total):
    lefts = told([(0, "x", 0, total), *((unit_s, "x", done, total) for done in range(1, total + 1))])
    assert lefts[:2] == [None, None]
    assert lefts[-1] is None
    assert lefts[2:-1] == [pytest.approx(unit_s * (total - done)) for done in range(2, total)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (95, "2 min"), (3000, "50 min"), (4800, "1 h 20 min")]
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert duration_text(seconds) == text
