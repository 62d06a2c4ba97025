"""Both sides asked: who loses is let go, nobody is asked twice, and what the caller passed may change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.policy import Budget, Policy
from outrider.prediction import Failure
from outrider_runtimes.errors import DeadlineExceeded, InferenceError, RemoteUnavailable
from support.runners import told, until
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid
from support.straight import StraightRunner
from support.told_failures import Told

JUDGED = {"deadline_ms": 20_000.0, "hedge_after_ms": 0.0, "min_margin": 0.5}
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
        until(lambda: hybrid._cloud.breaker.streak == cloud.submitted or hybrid._cloud.breaker.until_s is not None)
    assert hybrid._cloud.breaker.until_s is not None
    edge.let_go()
    assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")
    assert cloud.submitted == hybrid.policy.failures_in_a_row


def held_until(hybrid, edge, reached, x=SURE, **options):
    """A call in which the edge answers only after something has come true."""
    edge.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hybrid.infer, x, **options)
        until(reached)
        edge.let_go()
        return answer.result()


def answered_by_the_edge(hybrid, edge, cloud):
    """A call in which the edge answers only after the cloud was asked as well."""
    before = cloud.submitted
    return held_until(hybrid, edge, lambda: cloud.submitted == before + 1)


def test_a_quick_edge_leaves_the_cloud_alone(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, hedge_after_ms=GENEROUS_MS / 2))
    assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")
    assert cloud.submitted == 0


def test_a_hedge_gives_nothing_private_away_and_helps_where_the_edge_fails(edge, cloud):
    hybrid = Hybrid(edge, cloud, HEDGED)
    assert told(held_until(hybrid, edge, lambda: edge.submitted == 1, private=True)) == ("edge", "edge")
    assert cloud.submitted == 0
    edge.error = lambda: InferenceError("the edge is broken")
    assert told(hybrid.infer({"x": SURE}))[0] == "cloud"


def test_an_edge_that_lost_is_cancelled():
    edge, cloud = StraightRunner(), StraightRunner()
    edge.never = True
    assert told(Hybrid(edge, cloud, Policy(**JUDGED)).infer(SURE)) == ("cloud", "hedge")
    assert [future.cancelled() for future in edge.futures] == [True]


def test_an_uncertain_edge_that_is_first_waits_for_the_request_that_is_under_way(edge, cloud, tmp_path):
    policy = Policy(**JUDGED, budget=Budget(requests_per_day=5))
    with Hybrid(edge, cloud, policy, state=tmp_path) as hybrid, ThreadPoolExecutor(1) as pool:
        edge.hold()
        cloud.hold()
        answer = pool.submit(hybrid.infer, UNSURE)
        until(lambda: cloud.submitted == 1)
        edge.let_go()
        until(lambda: edge.finished == 1)
        cloud.let_go()
        assert told(answer.result()) == ("cloud", "uncertain")
        np.testing.assert_array_equal(answer.result().outputs["logits"], UNSURE * 2)
        assert cloud.submitted == hybrid._own_meter._spending.spent().day_requests == 1


@pytest.mark.parametrize("x", [UNSURE, SURE])
def test_a_cloud_that_failed_the_hedge_is_not_asked_again(edge, cloud, x):
    hybrid = Hybrid(edge, cloud, Policy(**JUDGED))
    cloud.error = lambda: RemoteUnavailable("gone")
    wanted = ("edge", "confident") if x is SURE else ("edge_degraded", "cloud_unavailable")
    assert told(held_until(hybrid, edge, lambda: cloud.finished == 1, x)) == wanted
    assert cloud.submitted == 1


def test_an_edge_that_fails_after_the_cloud_did_raises(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(**JUDGED))
    cloud.error = lambda: RemoteUnavailable("gone")
    edge.error = lambda: InferenceError("broke")
    with pytest.raises(InferenceError, match="broke"):
        held_until(hybrid, edge, lambda: cloud.finished == 1)
    assert cloud.submitted == 1


@pytest.mark.parametrize("said", [InferenceError("broke"), MemoryError("a copy"), ZeroDivisionError("a bug")])
def test_where_both_fail_the_edges_error_is_the_callers_and_told_once(edge, cloud, said):
    """The edge fails while the cloud is on its way, and the cloud after it."""
    hybrid = Hybrid(edge, cloud, Policy(**JUDGED))
    failed = Told(hybrid)
    edge.error, cloud.error = lambda: said, lambda: RemoteUnavailable("gone")
    edge.hold()
    cloud.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hybrid.infer, SURE)
        until(lambda: cloud.submitted == 1)
        edge.let_go()
        until(lambda: edge.finished == 1)
        cloud.let_go()
        assert answer.exception() is said
    assert failed.failures == [Failure(said, refused=False)]
    assert cloud.submitted == 1


def test_where_both_are_late_the_call_is_late_and_the_circuit_hears_of_it(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(**JUDGED | {"deadline_ms": 100.0}))
    edge.hold()
    cloud.hold()
    with pytest.raises(DeadlineExceeded):
        hybrid.infer(SURE)
    assert hybrid._cloud.breaker.streak == cloud.submitted


def test_the_request_of_a_hedge_is_the_audit_where_one_is_due(edge, cloud):
    policy = Policy(**JUDGED, audit_share=1.0, audit_allowed=0.02)
    hybrid = Hybrid(edge, cloud, policy)
    cloud.hold()
    assert told(held_until(hybrid, edge, lambda: cloud.submitted == 1)) == ("edge", "audit")
    assert cloud.submitted == 1 and not hybrid._audits.idle
    cloud.let_go()
    until(lambda: hybrid._audits.idle)


def test_the_caller_may_change_its_array_though_the_cloud_has_not_sent_it_yet(edge, cloud):
    """What is in a camera's buffer next may be private."""
    given = []
    submit = cloud.submit
    cloud.submit = lambda inputs, deadline: (given.append(inputs), submit(inputs, deadline))[1]
    hybrid, x = Hybrid(edge, cloud, Policy(**JUDGED)), SURE.copy()
    cloud.hold()
    assert told(held_until(hybrid, edge, lambda: cloud.submitted == 1, x)) == ("edge", "confident")
    x[:] = 7.0
    np.testing.assert_array_equal(given[0]["x"], SURE)
    cloud.let_go()
