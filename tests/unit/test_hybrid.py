"""Hybrid over two real runners with threads of their own: which side answers where both are well."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.bundle import OffloadRule
from outrider.policy import Policy
from outrider_runtimes.errors import (
    InferenceError,
    QueueFull,
    ShapeError,
)
from outrider_runtimes.scores import Score
from support.runners import told, until
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid

POLICY = Policy(GENEROUS_MS, min_margin=0.5)


def certified(score, thresholds) -> OffloadRule:
    return OffloadRule(score=score, alpha=0.01, delta=0.1, rows=1000, thresholds=thresholds)


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


def test_the_total_is_what_the_caller_waited(edge, cloud):
    hybrid, begun = Hybrid(edge, cloud, POLICY), time.perf_counter()
    edge.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hybrid.infer, {"x": UNSURE})
        until(lambda: edge.submitted == 1)
        held = time.perf_counter()
        threading.Event().wait(0.02)
        held_ms = (time.perf_counter() - held) * 1e3
        edge.let_go()
        timing = answer.result().timing_ms
    assert timing.infer > 0.0
    assert (
        held_ms <= timing.total <= (time.perf_counter() - begun) * 1e3
    )  # the edge's time too, though the cloud's wins
