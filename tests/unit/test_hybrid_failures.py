"""A side of a Hybrid that fails, refuses, is late or is stuck: who answers, and when it ends."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from outrider.policy import Policy
from outrider_runtimes.errors import (
    DeadlineExceeded,
    EngineError,
    InferenceError,
    InputError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from support.runners import told, until
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid
from support.straight import StraightRunner

# The clock of some of these tests stands still: waits are real, and a pause of the machine takes no time from a call.
LATE_S = 60.0  # what a loaded test machine may add; the 5 ms of the promise are the benchmark's to measure
POLICY = Policy(GENEROUS_MS, min_margin=0.5)


@pytest.mark.parametrize("error", [InferenceError("the engine broke"), RunnerClosed("closed"), MemoryError("a copy")])
def test_an_edge_that_fails_is_helped_by_the_cloud(edge, cloud, error):
    edge.error = lambda: error
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("cloud", "edge_failed")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RemoteUnavailable("connection refused"), "cloud_unavailable"),
        (RunnerClosed("closed"), "cloud_unavailable"),
        (RemoteRefused("503", status=503), "cloud_refused"),
        (RemoteRefused("503", status=503, retry_after_s=1.0), "cloud_busy"),
        (RemoteRefused("500", status=500, retry_after_s=1.0), "cloud_refused"),
        (ReplyError("wrong id"), "cloud_bad_reply"),
        (DeadlineExceeded("late"), "cloud_late"),
        (TimeoutError("a runner that does not know our errors"), "cloud_late"),
        (QueueFull("too many under way"), "cloud_busy"),
        (InferenceError("the engine broke"), "cloud_failed"),
        (InputError("it wants something else"), "cloud_failed"),
        (ZeroDivisionError("a bug"), "cloud_failed"),
    ],
)
@pytest.mark.parametrize("where", ["error", "refusal"])
def test_whatever_the_cloud_raises_the_edge_has_answered(edge, cloud, error, reason, where):
    if where == "refusal" and isinstance(error, TimeoutError) and not isinstance(error, DeadlineExceeded):
        reason = "cloud_failed"  # raised at once it was no waiting
    setattr(cloud, where, lambda: error)
    prediction = Hybrid(edge, cloud, POLICY).infer({"x": UNSURE})
    assert told(prediction) == ("edge_degraded", reason)
    np.testing.assert_array_equal(prediction.outputs["logits"], UNSURE)


def test_a_stuck_cloud_costs_the_time_that_is_left_and_no_more(cloud, clock):
    cloud.hold()
    hybrid = Hybrid(StraightRunner(), cloud, Policy(800.0, min_margin=0.5, reserve_ms=500.0), clock=clock)
    prediction = hybrid.infer({"x": UNSURE})
    assert told(prediction) == ("edge_degraded", "cloud_late")
    assert 300.0 <= prediction.timing_ms.total < 800.0 + LATE_S * 1e3


def test_five_failures_open_the_circuit_and_a_probe_closes_it(edge, cloud, clock):
    hybrid = Hybrid(edge, cloud, POLICY, clock=clock, rng=random.Random(1))
    cloud.error = lambda: RemoteUnavailable("down")
    for _ in range(5):
        assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "cloud_unavailable")
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "circuit_open")
    assert cloud.submitted == 5
    cloud.error = None
    clock.now_s += 4.9
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "circuit_open")
    clock.now_s += 5.0 * 1.25 - 4.9
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")


def test_a_failed_probe_waits_twice_as_long(edge, cloud, clock):
    hybrid = Hybrid(edge, cloud, POLICY, clock=clock, rng=random.Random(1))
    cloud.error = lambda: RemoteUnavailable("down")
    for _ in range(5):
        hybrid.infer({"x": UNSURE})
    clock.now_s += 7.0
    assert hybrid.infer({"x": UNSURE}).reason == "cloud_unavailable"
    clock.now_s += 9.9
    assert hybrid.infer({"x": UNSURE}).reason == "circuit_open"
    clock.now_s += 2.7
    assert hybrid.infer({"x": UNSURE}).reason == "cloud_unavailable"


def test_a_clock_that_jumps_ahead_forgets_what_is_old_and_breaks_nothing(edge, cloud, clock):
    """As on a board that slept: the circuit may be tried again, and a round trip of long ago is not believed."""
    hybrid = Hybrid(edge, cloud, POLICY, clock=clock, rng=random.Random(1))
    assert hybrid.infer({"x": UNSURE}).source == "cloud"
    cloud.expected_ms = 2 * GENEROUS_MS
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "no_time_left")
    cloud.error = lambda: RemoteUnavailable("down")
    clock.now_s += 86_400.0
    for _ in range(5):
        cloud.expected_ms = None
        assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "cloud_unavailable")
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "circuit_open")
    cloud.error = None
    clock.now_s += 86_400.0
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")


def test_lateness_opens_the_circuit_too(cloud, clock):
    cloud.hold()
    policy = Policy(300.0, min_margin=0.5, failures_in_a_row=2, open_s=60.0)
    hybrid = Hybrid(StraightRunner(), cloud, policy, clock=clock)
    sources = [hybrid.infer({"x": UNSURE}, deadline_ms=300.0 if n < 2 else GENEROUS_MS).reason for n in range(3)]
    assert sources == ["cloud_late", "cloud_late", "circuit_open"]


@pytest.mark.parametrize("said", [QueueFull("too many"), RemoteRefused("429", status=429, retry_after_s=1.0)])
def test_who_is_busy_says_nothing_against_the_cloud(edge, cloud, said):
    cloud.refusal = lambda: said
    hybrid = Hybrid(edge, cloud, POLICY)
    assert {hybrid.infer({"x": UNSURE}).reason for _ in range(20)} == {"cloud_busy"}


def test_a_late_answer_of_the_cloud_is_dropped(cloud, clock):
    cloud.hold()
    hybrid = Hybrid(StraightRunner(), cloud, Policy(300.0, min_margin=0.5), clock=clock)
    seen = []
    hybrid.on_prediction(seen.append)
    hybrid.infer({"x": UNSURE})
    cloud.let_go()
    until(lambda: cloud.finished == 1)
    assert [told(prediction) for prediction in seen] == [("edge_degraded", "cloud_late")]
    assert told(hybrid.infer({"x": UNSURE}, deadline_ms=GENEROUS_MS)) == ("cloud", "uncertain")


def test_a_cloud_that_was_chosen_for_the_queue_and_fails_leaves_the_edge_to_try(edge, cloud):
    edge.expected_ms, cloud.expected_ms = 2 * GENEROUS_MS, 1.0
    cloud.error = lambda: RemoteUnavailable("down")
    hybrid = Hybrid(edge, cloud, POLICY)
    for _ in range(2):  # with the refreshing request, and without
        assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "cloud_unavailable")


def test_no_time_left_for_the_round_trip(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    assert hybrid.infer({"x": UNSURE}).source == "cloud"
    cloud.expected_ms = 2 * GENEROUS_MS
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "no_time_left")


class Refusing(StraightRunner):
    """A Remote's two ways to be asked, of which it notes which was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.once: list[bool] = []
        self.error = RemoteUnavailable("refused", unsent=True)

    def submit(self, inputs, deadline):
        self.once.append(False)
        return super().submit(inputs, deadline)

    def submit_once(self, inputs, deadline):
        self.once.append(True)
        return super().submit(inputs, deadline)


def test_a_cloud_that_refuses_is_tried_again_only_where_the_edge_has_no_answer(edge):
    cloud, plain = Refusing(), StraightRunner()
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, min_margin=0.5, failures_in_a_row=100, window=200))
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "cloud_unavailable")
    edge.expected_ms, edge.cloud_only = 1.0, True  # the edge can still make it
    assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "cloud_unavailable")
    edge.cloud_only, edge.error = False, lambda: InferenceError("broke")
    with pytest.raises(InferenceError):
        hybrid.infer({"x": SURE})
    assert cloud.once == [True, True, False]
    edge.error = None
    assert told(Hybrid(edge, plain, POLICY).infer({"x": UNSURE})) == ("cloud", "uncertain")  # one without the other way


def test_a_stuck_edge_ends_on_time(edge, cloud):
    edge.hold()
    hybrid = Hybrid(edge, cloud, Policy(60.0, min_margin=0.5))
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        hybrid.infer({"x": SURE})
    assert 0.06 <= time.monotonic() - begun < 0.06 + LATE_S


def test_both_stuck_ends_on_time(edge, cloud, clock):
    edge.hold()
    cloud.hold()
    edge.expected_ms, cloud.expected_ms = 1000.0, 1.0
    hybrid = Hybrid(edge, cloud, Policy(60.0, min_margin=0.5), clock=clock)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="neither side"):
        hybrid.infer({"x": SURE})
    assert time.monotonic() - begun < 0.06 + LATE_S


def test_a_stuck_cloud_after_a_failed_edge_ends_on_time(edge, cloud, clock):
    edge.error = lambda: InferenceError("broke")
    cloud.hold()
    submit = cloud.submit

    def asked(inputs, deadline):
        clock.now_s += 1.0
        return submit(inputs, deadline)

    cloud.submit = asked
    with pytest.raises(DeadlineExceeded, match="broke"):
        Hybrid(edge, cloud, Policy(500.0), clock=clock).infer({"x": SURE})


def test_both_failing_raises_what_the_edge_said(edge, cloud):
    edge.error = lambda: InferenceError("the engine broke")
    cloud.error = lambda: RemoteUnavailable("down")
    with pytest.raises(EngineError, match="the engine broke") as caught:
        Hybrid(edge, cloud, POLICY).infer({"x": SURE})
    assert isinstance(caught.value.__cause__, RemoteUnavailable)


def test_a_failed_edge_behind_an_open_circuit_raises_at_once(edge, cloud):
    cloud.error = lambda: RemoteUnavailable("down")
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, min_margin=0.5, failures_in_a_row=1))
    hybrid.infer({"x": UNSURE})
    edge.error = lambda: InferenceError("the engine broke")
    with pytest.raises(EngineError):
        hybrid.infer({"x": SURE})
    assert cloud.submitted == 1


def test_a_closed_edge_raises_where_the_cloud_is_gone_too(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    edge.close()
    cloud.close()
    with pytest.raises(RunnerClosed):
        hybrid.infer({"x": SURE})
