"""Hybrid over two real runners with threads of their own; every path, and what a stuck or failing side does."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.bundle import OffloadRule
from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InferenceError,
    InputError,
    InterfaceMismatch,
    NotFiniteError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
    ShapeError,
    UnknownTensor,
)
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Interface, TensorSpec
from support.runners import CLASSES, INTERFACE, OTHER_INTERFACE, ConnectingRunner, NumpyRunner

SURE = np.array([[9.0, 0.0, 0.0, 0.0]], dtype=np.float32)
UNSURE = np.array([[0.1, 0.0, 0.0, 0.0]], dtype=np.float32)
GENEROUS_MS = 20_000.0  # where no deadline should be met by chance on a loaded machine
LATE_S = 5.0  # what a loaded test machine may add; the 5 ms of the promise are the benchmark's to measure
POLICY = Policy(GENEROUS_MS, min_margin=0.5)


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def edge():
    runner = NumpyRunner(gain=1.0)
    yield runner
    runner.close()


@pytest.fixture
def cloud():
    runner = NumpyRunner(gain=2.0)
    yield runner
    runner.close()


def wait_for(condition, timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.001)


def told(prediction) -> tuple[str, str]:
    return prediction.source, prediction.reason


def certified(score, thresholds) -> OffloadRule:
    return OffloadRule(score=score, alpha=0.01, delta=0.1, rows=1000, thresholds=thresholds)


# --- both sides well


def test_a_confident_answer_stays_at_the_edge(edge, cloud):
    prediction = Hybrid(edge, cloud, POLICY).infer({"x": SURE})
    assert told(prediction) == ("edge", "confident")
    np.testing.assert_array_equal(prediction.outputs["logits"], SURE)
    assert cloud.submitted == 0


def test_an_uncertain_answer_comes_from_the_cloud(edge, cloud):
    prediction = Hybrid(edge, cloud, POLICY).infer({"x": UNSURE})
    assert told(prediction) == ("cloud", "uncertain")
    np.testing.assert_array_equal(prediction.outputs["logits"], UNSURE * 2)


def test_one_uncertain_row_sends_the_batch(edge, cloud):
    prediction = Hybrid(edge, cloud, POLICY).infer({"x": np.concatenate([SURE, UNSURE])})
    assert told(prediction) == ("cloud", "uncertain")


def test_a_policy_that_judges_nothing_stays_at_the_edge(edge, cloud):
    assert told(Hybrid(edge, cloud, Policy(GENEROUS_MS)).infer({"x": UNSURE})) == ("edge", "edge")


@pytest.mark.parametrize("kind", ["margin", "entropy", "energy"])
def test_the_threshold_that_an_export_certified_is_obeyed(edge, cloud, kind):
    score = Score(kind=kind, output="logits")
    low, high = score.least({"logits": UNSURE}), score.least({"logits": SURE})
    edge.variant, edge.offload = "a", certified(score, {"a": (low + high) / 2, "b": high + 1.0})
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS))
    assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    edge.variant = "b"  # each variant has its own
    assert told(hybrid.infer({"x": SURE})) == ("cloud", "uncertain")


def test_the_callers_own_rule_goes_before_the_certified_one(edge, cloud):
    edge.variant, edge.offload = "a", certified(Score(output="logits"), {"a": 2.0})
    assert told(Hybrid(edge, cloud, Policy(GENEROUS_MS)).infer({"x": SURE})) == ("cloud", "uncertain")
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("edge", "confident")
    unjudged = Policy(GENEROUS_MS, obey_certified=False)
    assert told(Hybrid(edge, cloud, unjudged).infer({"x": UNSURE})) == ("edge", "edge")


def test_what_is_private_never_leaves_the_board(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    assert told(hybrid.infer({"x": UNSURE}, private=True)) == ("edge_degraded", "private")
    assert told(hybrid.infer({"x": SURE}, private=True)) == ("edge", "confident")
    edge.expected_ms, cloud.expected_ms = 2 * GENEROUS_MS, 1.0  # the policy would ask the cloud first
    assert told(hybrid.infer({"x": SURE}, private=True)) == ("edge", "confident")
    edge.error = lambda: InferenceError("the edge is broken")
    with pytest.raises(InferenceError, match="the edge is broken"):
        hybrid.infer({"x": SURE}, private=True)
    assert cloud.submitted == 0


def test_a_size_that_the_boards_file_does_not_take_goes_to_the_cloud(edge, cloud):
    edge.error = lambda: ShapeError("the file takes T = 8 or 16", tensor="x")
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("cloud", "shape")
    edge.refusal = lambda: ShapeError("the file takes T = 8 or 16", tensor="x")
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("cloud", "shape")
    with pytest.raises(ShapeError, match="T = 8 or 16"):
        Hybrid(edge, cloud, POLICY).infer({"x": SURE}, private=True)


# --- hedging


HEDGED = Policy(GENEROUS_MS, hedge_after_ms=0.0)


def test_a_slow_edge_is_not_waited_for_where_both_are_asked(edge, cloud):
    edge.hold()
    prediction = Hybrid(edge, cloud, HEDGED).infer({"x": SURE})
    assert told(prediction) == ("cloud", "hedge")
    np.testing.assert_array_equal(prediction.outputs["logits"], SURE * 2)
    edge.let_go()


def test_an_edge_that_answers_first_is_taken(edge, cloud):
    hybrid = Hybrid(edge, cloud, HEDGED)
    cloud.hold()
    assert told(answered_by_the_edge(hybrid, edge, cloud)) == ("edge", "edge")
    cloud.let_go()


def test_an_attempt_that_nobody_waits_for_still_speaks_of_the_cloud(edge, cloud):
    hybrid = Hybrid(edge, cloud, HEDGED)
    cloud.error = lambda: RemoteUnavailable("gone")
    for _ in range(hybrid.policy.failures_in_a_row):
        cloud.hold()
        assert told(answered_by_the_edge(hybrid, edge, cloud)) == ("edge", "edge")
        cloud.let_go()
        wait_for(lambda: hybrid._cloud.breaker.streak == cloud.submitted or hybrid._cloud.breaker.until_s is not None)
    assert hybrid._cloud.breaker.until_s is not None
    edge.let_go()
    assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")
    assert cloud.submitted == hybrid.policy.failures_in_a_row


def answered_by_the_edge(hybrid, edge, cloud):
    """A call in which the edge answers only after the cloud was asked as well."""
    before = cloud.submitted
    edge.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hybrid.infer, {"x": SURE})
        wait_for(lambda: cloud.submitted == before + 1)
        edge.let_go()
        return answer.result()


def test_a_quick_edge_leaves_the_cloud_alone(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, hedge_after_ms=GENEROUS_MS / 2))
    assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")
    assert cloud.submitted == 0


def test_a_hedge_gives_nothing_private_away_and_helps_where_the_edge_fails(edge, cloud):
    hybrid = Hybrid(edge, cloud, HEDGED)
    edge.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hybrid.infer, {"x": SURE}, private=True)
        wait_for(lambda: edge.submitted == 1)
        edge.let_go()
        assert told(answer.result()) == ("edge", "edge")
    assert cloud.submitted == 0
    edge.error = lambda: InferenceError("the edge is broken")
    assert told(hybrid.infer({"x": SURE}))[0] == "cloud"


def test_one_array_will_do_where_there_is_one_input(edge, cloud):
    assert told(Hybrid(edge, cloud, POLICY).infer(SURE)) == ("edge", "confident")


def test_an_edge_that_is_too_slow_is_passed_by(edge, cloud):
    edge.expected_ms, cloud.expected_ms = 2 * GENEROUS_MS, 1.0
    hybrid = Hybrid(edge, cloud, POLICY)
    assert told(hybrid.infer({"x": SURE})) == ("cloud", "queue")
    assert edge.submitted == 1  # its latency was never measured: once in a while it gets the request too
    assert told(hybrid.infer({"x": SURE})) == ("cloud", "queue")
    assert edge.submitted == 1


def test_a_cloud_that_nobody_measured_is_tried_beside_the_edge(edge, cloud):
    edge.expected_ms = 2 * GENEROUS_MS
    hybrid = Hybrid(edge, cloud, POLICY)
    assert told(hybrid.infer({"x": SURE})) == ("cloud", "queue")
    assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
    assert (edge.submitted, cloud.submitted) == (2, 1)


def test_a_full_queue_at_the_edge_goes_to_the_cloud(edge, cloud):
    edge.refusal = lambda: QueueFull("full")
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("cloud", "queue")


@pytest.mark.parametrize("error", [InferenceError("the engine broke"), RunnerClosed("closed")])
def test_an_edge_that_fails_is_helped_by_the_cloud(edge, cloud, error):
    edge.error = lambda: error
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": SURE})) == ("cloud", "edge_failed")


def test_the_total_is_what_the_caller_waited(edge, cloud):
    begun = time.perf_counter()
    timing = Hybrid(edge, cloud, POLICY).infer({"x": UNSURE}).timing_ms
    assert 0.0 < timing.infer <= timing.total <= (time.perf_counter() - begun) * 1e3


# --- the cloud ill


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RemoteUnavailable("connection refused"), "cloud_unavailable"),
        (RunnerClosed("closed"), "cloud_unavailable"),
        (RemoteRefused("503", status=503), "cloud_refused"),
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


def test_a_stuck_cloud_costs_the_time_that_is_left_and_no_more(edge, cloud):
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(800.0, min_margin=0.5, reserve_ms=500.0))
    prediction = hybrid.infer({"x": UNSURE})
    assert told(prediction) == ("edge_degraded", "cloud_late")
    assert 300.0 <= prediction.timing_ms.total < 800.0 + LATE_S * 1e3


def test_five_failures_open_the_circuit_and_a_probe_closes_it(edge, cloud):
    clock = Clock()
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


def test_a_failed_probe_waits_twice_as_long(edge, cloud):
    clock = Clock()
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


def test_lateness_opens_the_circuit_too(edge, cloud):
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(300.0, min_margin=0.5, failures_in_a_row=2, open_s=60.0))
    sources = [hybrid.infer({"x": UNSURE}, deadline_ms=300.0 if n < 2 else GENEROUS_MS).reason for n in range(3)]
    assert sources == ["cloud_late", "cloud_late", "circuit_open"]


def test_a_busy_client_says_nothing_about_the_cloud(edge, cloud):
    cloud.refusal = lambda: QueueFull("too many under way")
    hybrid = Hybrid(edge, cloud, POLICY)
    assert {hybrid.infer({"x": UNSURE}).reason for _ in range(20)} == {"cloud_busy"}


def test_a_late_answer_of_the_cloud_is_dropped(edge, cloud):
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(300.0, min_margin=0.5))
    seen = []
    hybrid.on_prediction(seen.append)
    hybrid.infer({"x": UNSURE})
    cloud.let_go()
    wait_for(lambda: cloud.finished == 1)
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


# --- the edge ill


def test_a_stuck_edge_ends_on_time(edge, cloud):
    edge.hold()
    hybrid = Hybrid(edge, cloud, Policy(60.0, min_margin=0.5))
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        hybrid.infer({"x": SURE})
    assert 0.06 <= time.monotonic() - begun < 0.06 + LATE_S


def test_both_stuck_ends_on_time(edge, cloud):
    edge.hold()
    cloud.hold()
    edge.expected_ms, cloud.expected_ms = 1000.0, 1.0
    hybrid = Hybrid(edge, cloud, Policy(60.0, min_margin=0.5))
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="neither side"):
        hybrid.infer({"x": SURE})
    assert time.monotonic() - begun < 0.06 + LATE_S


def test_a_stuck_cloud_after_a_failed_edge_ends_on_time(edge, cloud):
    edge.error = lambda: InferenceError("broke")
    cloud.hold()
    with pytest.raises(DeadlineExceeded, match="broke"):
        Hybrid(edge, cloud, Policy(60.0)).infer({"x": SURE})


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


def test_a_deadline_may_be_never(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(None, min_margin=0.5))
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")


@pytest.mark.parametrize("deadline_ms", [0.0, -1.0, math.nan])
def test_a_deadline_that_is_none_is_refused(edge, cloud, deadline_ms):
    with pytest.raises(ConfigError, match="deadline_ms"):
        Hybrid(edge, cloud, POLICY).infer({"x": SURE}, deadline_ms=deadline_ms)


# --- bad input


def bad_inputs():
    yield {}, UnknownTensor
    yield {"y": SURE}, UnknownTensor
    yield {"x": SURE, "y": SURE}, UnknownTensor
    yield {"x": SURE.astype(np.float64)}, InputError
    yield {"x": SURE[0]}, InputError
    yield {"x": SURE * np.float32("nan")}, NotFiniteError
    yield [[1.0, 2.0, 3.0, 4.0]], InputError


@pytest.mark.parametrize(("inputs", "error"), list(bad_inputs()))
def test_bad_input_reaches_neither_side_and_the_next_call_is_the_same_bits(edge, cloud, inputs, error):
    hybrid = Hybrid(edge, cloud, POLICY)
    before = [hybrid.infer({"x": x}).outputs["logits"].tobytes() for x in (SURE, UNSURE)]
    submitted = edge.submitted, cloud.submitted
    with pytest.raises(error):
        hybrid.infer(inputs)
    assert (edge.submitted, cloud.submitted) == submitted
    assert [hybrid.infer({"x": x}).outputs["logits"].tobytes() for x in (SURE, UNSURE)] == before


def two_headed() -> Interface:
    outputs = (
        TensorSpec(name="logits", dtype="float32", shape=(None, CLASSES), axes="NC"),
        TensorSpec(name="label", dtype="int64", shape=(None,), axes="N"),
    )
    return Interface(inputs=INTERFACE.inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "scores"}, "scores"),
        ({"min_margin": 0.5}, "not given"),
        ({"min_margin": 0.5, "output": "label"}, "label.*int64"),
    ],
)
def test_a_policy_that_does_not_fit_the_interface_is_refused(changes, message):
    edge, cloud = NumpyRunner(interface=two_headed()), NumpyRunner(interface=two_headed())
    try:
        with pytest.raises(ConfigError, match=message):
            Hybrid(edge, cloud, Policy(80.0, **changes))
    finally:
        edge.close()
        cloud.close()


# --- two interfaces


def test_another_interface_is_refused(edge):
    other = NumpyRunner(interface=OTHER_INTERFACE)
    with pytest.raises(InterfaceMismatch, match=OTHER_INTERFACE.digest[:12]):
        Hybrid(edge, other, POLICY)
    other.close()


def test_another_interface_of_a_remote_is_refused(edge):
    other = ConnectingRunner(interface=OTHER_INTERFACE)
    with pytest.raises(InterfaceMismatch):
        Hybrid(edge, other, POLICY)
    other.close()


def test_a_cloud_that_is_down_at_first_is_compared_before_it_is_asked(edge):
    late = ConnectingRunner(down=True)
    hybrid = Hybrid(edge, late, POLICY)
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "cloud_unavailable")
    assert late.submitted == 0
    late.down = False
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert late.connects == 3
    late.close()


def test_a_cloud_found_different_later_is_never_asked_and_it_is_logged_once(edge, caplog):
    late = ConnectingRunner(down=True, interface=OTHER_INTERFACE)
    hybrid = Hybrid(edge, late, POLICY)
    late.down = False
    for _ in range(5):
        assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "interface_mismatch")
    assert late.submitted == 0
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    late.close()


def test_a_cloud_that_changes_its_interface_under_way_is_never_asked_again(edge):
    cloud = ConnectingRunner()
    hybrid = Hybrid(edge, cloud, POLICY)
    assert hybrid.infer({"x": UNSURE}).source == "cloud"
    cloud.interface_digest = OTHER_INTERFACE.digest
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "interface_mismatch")
    assert cloud.submitted == 1
    cloud.close()


def test_a_silent_cloud_holds_neither_the_constructor_nor_a_call(edge):
    silent = ConnectingRunner(slow=True)
    begun = time.monotonic()
    hybrid = Hybrid(edge, silent, Policy(500.0, min_margin=0.5))
    assert time.monotonic() - begun < 1.0 + LATE_S
    with ThreadPoolExecutor(8) as pool:
        predictions = list(pool.map(lambda _: hybrid.infer({"x": UNSURE}), range(8)))
    assert {told(p) for p in predictions} <= {("edge_degraded", "cloud_late"), ("edge_degraded", "circuit_open")}
    assert max(p.timing_ms.total for p in predictions) < 500.0 + LATE_S * 1e3
    silent.close()


# --- many callers, callbacks, lifetime


def test_many_threads_get_each_their_own_answer(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    seen: list[str] = []
    hybrid.on_prediction(lambda p: seen.append(p.source))
    rng = np.random.default_rng(7)
    inputs = [rng.normal(0.0, 2.0, (1, CLASSES)).astype(np.float32) for _ in range(400)]

    def ask(x):
        return x, hybrid.infer({"x": x})

    with ThreadPoolExecutor(16) as pool:
        for x, prediction in pool.map(ask, inputs):
            gain = {"edge": 1.0, "cloud": 2.0}[prediction.source]
            np.testing.assert_array_equal(prediction.outputs["logits"], x * np.float32(gain))
    assert Counter(seen) == {"edge": edge.submitted - cloud.submitted, "cloud": cloud.submitted}
    assert 0 < cloud.submitted < 400


def test_under_many_threads_one_probe_goes_out(edge, cloud):
    clock = Clock()
    hybrid = Hybrid(edge, cloud, Policy(2000.0, min_margin=0.5, failures_in_a_row=1), clock=clock)
    cloud.error = lambda: RemoteUnavailable("down")
    hybrid.infer({"x": UNSURE})
    assert cloud.submitted == 1
    clock.now_s += 10.0
    cloud.error = None
    cloud.hold()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(hybrid.infer, {"x": UNSURE}) for _ in range(8)]
        wait_for(lambda: sum(future.done() for future in futures) == 7)
        assert cloud.submitted == 2
        cloud.let_go()
        assert Counter(told(f.result()) for f in futures) == {
            ("edge_degraded", "circuit_open"): 7,
            ("cloud", "uncertain"): 1,
        }


def test_stuck_sides_hold_no_thread_of_ours(edge, cloud):
    edge.hold()
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(5.0, min_margin=0.5, reserve_ms=1.0))
    before = threading.active_count()
    for _ in range(30):
        with pytest.raises((DeadlineExceeded, QueueFull)):
            hybrid.infer({"x": SURE})
    assert threading.active_count() == before


def test_callbacks_come_and_go_and_may_fail(edge, cloud, caplog):
    hybrid = Hybrid(edge, cloud, POLICY)
    first, second = [], []
    off = hybrid.on_prediction(first.append)
    hybrid.on_prediction(lambda _: 1 / 0)
    hybrid.on_prediction(second.append)
    predictions = [hybrid.infer({"x": SURE}), hybrid.infer({"x": SURE})]
    off()
    off()
    predictions.append(hybrid.infer({"x": UNSURE}))
    assert first == predictions[:2]
    assert second == predictions
    assert len([r for r in caplog.records if "callback" in r.message]) == 1


def test_the_same_callback_twice_is_two(edge, cloud):
    hybrid, seen = Hybrid(edge, cloud, POLICY), []
    callback = seen.append
    off = hybrid.on_prediction(callback)
    hybrid.on_prediction(callback)
    off()
    hybrid.infer({"x": SURE})
    assert len(seen) == 1


def test_close_ends_the_hybrid_and_neither_side(edge, cloud):
    with Hybrid(edge, cloud, POLICY) as hybrid:
        assert hybrid.interface is edge.interface
    with pytest.raises(RunnerClosed):
        hybrid.infer({"x": SURE})
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": UNSURE})) == ("cloud", "uncertain")


def test_a_closed_edge_raises_where_the_cloud_is_gone_too(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    edge.close()
    cloud.close()
    with pytest.raises(RunnerClosed):
        hybrid.infer({"x": SURE})
