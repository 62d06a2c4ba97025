"""Who is let in: rooms, bytes, time and the end; and which error becomes which refusal."""

from __future__ import annotations

import contextlib

import pytest

from outrider.endpoint.intake import BODIES_AT_ONCE, Intake, retry_after_s
from outrider.endpoint.refusals import Refused, refusal
from outrider_runtimes import errors

BODY = 1000


def never() -> float | None:
    raise AssertionError("the estimate is asked for only where it is used")


def test_as_many_wait_as_may_for_each_model_and_each_leaves_room_when_it_goes():
    intake = Intake(queue=2, body_bytes=BODY)
    with contextlib.ExitStack() as stack:
        late = stack.enter_context(intake.visit("digits", estimate_ms=lambda: 2500.0))
        for _ in range(2):
            stack.enter_context(stack.enter_context(intake.visit("digits", estimate_ms=never)).queued())
        with pytest.raises(Refused, match="2 requests wait for this model, no more may") as caught:
            stack.enter_context(intake.visit("digits", estimate_ms=lambda: 2500.0))
        assert (caught.value.status, caught.value.reason, caught.value.retry_after_s) == (429, "queue_full", 3)
        with pytest.raises(Refused, match="no more may"):  # it came in time, and others were read faster
            stack.enter_context(late.queued())
        with intake.visit("cats", estimate_ms=never) as cat, cat.queued():
            assert (intake.inside(), intake.inside("digits"), intake.queued("cats")) == (4, 3, 1)
    assert intake.inside() == intake.queued("digits") == 0
    with intake.visit("digits", estimate_ms=never) as visit, visit.queued():
        pass


def test_bodies_on_their_way_take_no_room_in_the_queue():
    intake = Intake(queue=1, body_bytes=BODY)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(intake.visit("digits", estimate_ms=never))
        with intake.visit("digits", estimate_ms=never) as visit, visit.queued():
            assert (intake.inside("digits"), intake.queued("digits")) == (101, 1)


def test_what_can_be_refused_before_the_model_is_known():
    intake = Intake(queue=1, body_bytes=BODY)
    both = {"digits": lambda: 2500.0, "cats": never}
    with contextlib.ExitStack() as stack:
        visit = stack.enter_context(intake.visit("digits", estimate_ms=never))
        stack.enter_context(visit.queued())
        intake.check_open(both, size=BODIES_AT_ONCE * BODY)
        with pytest.raises(Refused, match="no more may") as caught:
            intake.check_open({"digits": both["digits"]})
        assert (caught.value.status, caught.value.retry_after_s) == (429, 3)
        visit.hold(1)
        with pytest.raises(Refused, match="too many bytes") as caught:
            intake.check_open(both, size=BODIES_AT_ONCE * BODY)
        assert (caught.value.status, caught.value.reason) == (503, "no_memory")
        intake.stop()
        with pytest.raises(Refused, match="being stopped"):
            intake.check_open(both)


def test_a_reply_that_is_still_sent_counts_as_inside():
    intake = Intake(queue=1, body_bytes=BODY)
    with intake.visit("digits", estimate_ms=never) as visit:
        visit.hold(BODY)
        leave = intake.stay("digits")
    assert (intake.inside(), intake.held_bytes) == (1, 0)
    leave()
    assert intake.inside() == 0


def test_whoever_fails_inside_leaves_nothing_behind():
    intake = Intake(queue=1, body_bytes=BODY)
    for _ in range(3):
        with pytest.raises(ValueError), intake.visit("digits", estimate_ms=never) as visit:
            visit.hold(700)
            with visit.queued():
                assert (intake.queued("digits"), intake.held_bytes) == (1, 700)
                raise ValueError
    assert (intake.inside(), intake.queued("digits"), intake.held_bytes) == (0, 0, 0)


def test_bodies_are_held_until_their_requests_leave():
    intake = Intake(body_bytes=BODY)
    with contextlib.ExitStack() as stack:
        visits = [stack.enter_context(intake.visit("digits", estimate_ms=never)) for _ in range(5)]
        for visit in visits[:BODIES_AT_ONCE]:
            visit.hold(BODY)
        with pytest.raises(Refused, match="too many bytes") as caught:
            visits[-1].hold(1)
        assert (caught.value.status, caught.value.reason) == (503, "no_memory")
        assert intake.held_bytes == BODIES_AT_ONCE * BODY
    assert intake.held_bytes == 0


def test_after_the_stop_nobody_comes_in_and_who_is_inside_stays():
    intake = Intake(body_bytes=BODY)
    with intake.visit("digits", estimate_ms=never) as visit:
        intake.stop()
        visit.hold(10)
        with pytest.raises(Refused) as caught, intake.visit("digits", estimate_ms=never):
            pass
        assert (caught.value.status, caught.value.reason, caught.value.retry_after_s) == (503, "stopping", 1)
        assert intake.stopping and intake.inside() == 1


def test_what_the_queue_would_keep_too_long_is_refused_but_never_where_nothing_waits():
    intake = Intake(body_bytes=BODY)
    said: list[float | None] = [99.0, None, 101.0]
    with (
        intake.visit("digits", estimate_ms=never) as first,
        intake.visit("digits", estimate_ms=lambda: said.pop(0)) as second,
    ):
        first.check_time(0.001)  # whatever the estimate would be: a call is what corrects it
        with first.queued():
            second.check_time(0.1)
            second.check_time(0.1)
            with pytest.raises(Refused, match="some 101 ms from now, the request has 100 ms left") as caught:
                second.check_time(0.1)
            assert (caught.value.status, caught.value.reason, said) == (503, "no_time", [])


@pytest.mark.parametrize(("estimate_ms", "seconds"), [(None, 1), (0.0, 1), (999.0, 1), (1001.0, 2), (1e9, 60)])
def test_retry_after_is_the_queue_of_now(estimate_ms, seconds):
    assert retry_after_s(estimate_ms) == seconds


def test_a_queue_without_room_is_a_config_error():
    with pytest.raises(errors.ConfigError, match="queue is 0"):
        Intake(queue=0, body_bytes=BODY)


KINDS = {
    "UnknownModel": (404, "unknown"),
    "InputError": (400, "bad_input"),
    "ShapeError": (400, "bad_input"),
    "QueueFull": (429, "queue_full"),
    "RunnerStuck": (503, "stuck"),
    "RunnerClosed": (503, "stopping"),
    "DeadlineExceeded": (504, "deadline"),
    "InferenceError": (500, "model_failed"),
    "RolledBack": (500, "model_failed"),
    "StoreError": (500, "model_failed"),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_error_has_one_status_and_one_word(name):
    why = refusal(getattr(errors, name)("it went wrong in /home/someone/model.onnx", hint="look into /etc/outrider/x"))
    assert (why.status, why.reason) == KINDS[name]
    assert (why.retry_after_s is not None) is (why.status in (429, 503))
    if why.status == 500:
        assert "/home" not in str(why) and "/etc" not in str(why)


def test_what_is_no_error_of_ours_says_nothing_and_a_refusal_stays_what_it_is():
    why = refusal(KeyError("secret"))
    assert (why.status, why.reason, str(why)) == (500, "fault", "internal error")
    assert refusal(why) is why
    assert len(str(Refused(400, "bad_input", "x" * 10_000))) == 1000


def test_bytes_that_are_held_become_more_or_fewer_and_are_freed_once():
    intake = Intake(queue=1, body_bytes=BODY)
    first, second = intake.holding(), intake.holding()
    first.become(BODIES_AT_ONCE * BODY)
    with pytest.raises(Refused) as caught:
        second.become(1)
    assert caught.value.reason == "no_memory" and intake.held_bytes == BODIES_AT_ONCE * BODY
    first.become(BODY)
    second.become((BODIES_AT_ONCE - 1) * BODY)
    first.become(2 * BODY, anyway=True)
    assert intake.held_bytes == (BODIES_AT_ONCE + 1) * BODY
    first.become(BODY)  # fewer are never refused
    for _ in range(2):
        first.free()
    first.become(BODY, anyway=True)  # it was freed: its call had ended already
    assert intake.held_bytes == (BODIES_AT_ONCE - 1) * BODY
    second.free()
    assert intake.held_bytes == 0
