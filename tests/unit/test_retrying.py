"""When a request is sent again: never what may have run, never without time for an answer, never at one moment."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes.errors import DeadlineExceeded, RemoteRefused, RemoteUnavailable, ReplyError, RunnerClosed
from outrider_runtimes.retrying import FIRST_PAUSE_S, LONGEST_PAUSE_S, SHARE_OF_TIME, pause_s

UNSENT = RemoteUnavailable("refused", unsent=True)


def busy(seconds: float | None, status: int = 503) -> RemoteRefused:
    return RemoteRefused("busy", status=status, retry_after_s=seconds)


def asked(failure, *, tries=1, left_s=10.0, usual_s=0.0, draw=0.5):
    return pause_s(failure, tries=tries, left_s=left_s, usual_s=usual_s, draw=draw)


@pytest.mark.parametrize(
    "failure",
    [
        RemoteUnavailable("broke in the reply"),
        ReplyError("nonsense"),
        RunnerClosed("closed"),
        DeadlineExceeded("late"),
        busy(None),
        busy(None, 429),
        busy(0.0, 500),
        busy(0.0, 504),
        busy(0.0, 302),
    ],
)
def test_what_may_have_run_or_will_not_change_is_not_sent_again(failure):
    assert asked(failure) is None


def test_who_has_another_answer_does_not_wait_for_who_is_not_there():
    impatient = {"tries": 1, "left_s": 10.0, "usual_s": 0.0, "draw": 0.5, "patient": False}
    assert pause_s(UNSENT, **impatient) is None
    assert pause_s(busy(1.0), **impatient) is not None  # a sound endpoint that says when


def test_pauses_double_and_spread():
    assert [asked(UNSENT, tries=n) for n in (1, 2, 3)] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    spread = [asked(UNSENT, draw=draw) for draw in (0.0, 0.25, 0.75)]
    assert spread == sorted(set(spread)) and spread[0] == FIRST_PAUSE_S / 2


@pytest.mark.parametrize("status", [429, 503])
def test_an_endpoint_is_not_asked_before_it_says(status):
    assert asked(busy(1.0, status), draw=0.0) == 1.0
    assert 1.0 < asked(busy(1.0, status), draw=0.9) < 1.0 + FIRST_PAUSE_S
    assert asked(busy(3600.0, status), left_s=math.inf) is None


def test_there_must_be_time_for_the_usual_answer_and_as_much_again():
    left_s = (FIRST_PAUSE_S + 0.05) / SHARE_OF_TIME
    assert asked(UNSENT, left_s=left_s * 1.001, usual_s=0.05) == FIRST_PAUSE_S
    assert asked(UNSENT, left_s=left_s * 0.999, usual_s=0.05) is None
    assert asked(UNSENT, left_s=0.0) is None
    assert asked(busy(1.0), left_s=1.5) is None


@given(
    st.one_of(st.just(UNSENT), st.floats(0, 1e6).map(busy)),
    st.integers(1, 30),
    st.floats(0, 1e9) | st.just(math.inf),
    st.floats(0, 1e4),
    st.floats(0, 1, exclude_max=True),
)
def test_a_pause_is_never_longer_than_what_is_left(failure, tries, left_s, usual_s, draw):
    pause = pause_s(failure, tries=tries, left_s=left_s, usual_s=usual_s, draw=draw)
    assert pause is None or (0 <= pause <= LONGEST_PAUSE_S and pause + usual_s <= left_s)
