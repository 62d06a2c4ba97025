"""The time that is left, told from the time that passed, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.passes import Progress
from outrider_exporters.progress import SOONEST_S, duration_text, with_time_left


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(events):
    """What is shown of (seconds since the event before, step, done, total)."""
    clock, shown = Clock(), []
    show = with_time_left(shown.append, clock=clock)
    for wait, step, done, total in events:
        clock.now += wait
        show(Progress(step=step, done=done, total=total))
    return [progress.left_s for progress in shown]


def test_the_rest_is_as_fast_as_what_was_done():
    assert told([(0, "distill", 0, 4), (10, "distill", 1, 4), (20, "distill", 2, 4), (0, "distill", 4, 4)]) == [
        None,
        pytest.approx(30.0),
        pytest.approx(30.0),
        None,
    ]


def test_a_step_that_begins_with_its_first_unit_done_is_timed_from_there():
    assert told([(0, "distill", 1, 3), (5, "distill", 2, 3)]) == [None, pytest.approx(5.0)]


def test_steps_within_steps_are_timed_apart():
    events = [(0, "passes", 0, 2), (0, "scan", 0, 10), (2, "scan", 1, 10), (8, "passes", 1, 2)]
    assert told(events) == [None, None, pytest.approx(18.0), pytest.approx(10.0)]


def test_a_step_that_starts_again_is_timed_again():
    assert told([(0, "distill", 1, 2), (50, "distill", 2, 2), (5, "distill", 0, 2), (3, "distill", 1, 2)])[-1] == 3.0


def test_nothing_is_said_too_soon_or_of_a_single_unit():
    assert told([(0, "convert", 0, 9), (SOONEST_S / 2, "convert", 1, 9), (60, "bundle", 0, 1)]) == [None] * 3


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20)), max_size=20))
def test_an_estimate_is_never_negative(steps):
    assert all(left is None or left >= 0.0 for left in told([(wait, "x", done, 20) for wait, done in steps]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (95, "2 min"), (3000, "50 min"), (4800, "1 h 20 min")]
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert duration_text(seconds) == text
