"""Audits of confident answers, and what the offloaded ones say: bounds, events, and that no caller waits for it."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from outrider.bundle import OffloadRule
from outrider.hybrid.audits import may_differ
from outrider.hybrid.judging import differing
from outrider.policy import Budget, Policy
from outrider.spending import Spending
from outrider_runtimes.errors import ConfigError, RemoteUnavailable
from outrider_runtimes.scores import Score
from support.runners import ConnectingRunner, told, until
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid

SCORE = Score(output="logits")
EVERY = {"min_margin": 0.5, "audit_share": 1.0, "audit_allowed": 0.01}


def audited(hybrid, cloud, times, x=SURE):
    """So many calls, each audited: the next begins when the audit before has ended."""
    for _ in range(times):
        before = cloud.finished
        assert told(hybrid.infer({"x": x})) == ("edge", "audit")
        until(lambda: cloud.finished > before)  # noqa: B023
        until(lambda: hybrid._audits.idle)


MAY_DIFFER = {"kept": 0.01, "offloaded": 0.3}


def certified(entry: object = None, *, threshold: float = 0.5) -> OffloadRule:
    return OffloadRule(
        score=SCORE,
        alpha=0.01,
        delta=0.1,
        rows=1000,
        thresholds={"v": threshold},
        measured={} if entry is None else {"v": entry},
    )


# --- audits


def test_an_audited_answer_is_the_edges_and_waits_for_nobody(edge, cloud):
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, **EVERY))
    prediction = hybrid.infer({"x": SURE})
    assert told(prediction) == ("edge", "audit")
    np.testing.assert_array_equal(prediction.outputs["logits"], SURE)
    for _ in range(5):  # one at a time: what is under way is not piled up on
        assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
    assert cloud.submitted == 1
    cloud.let_go()


def test_the_share_is_drawn_by_chance_and_nothing_is_drawn_by_default(edge, cloud):
    hybrid = Hybrid(
        edge,
        cloud,
        Policy(GENEROUS_MS, min_margin=0.5, audit_share=0.25, audit_allowed=0.5),
        rng=random.Random(5),
    )
    reasons = []
    for _ in range(400):
        reasons.append(hybrid.infer({"x": SURE}).reason)
        until(lambda: hybrid._audits.idle)
    assert set(reasons) == {"audit", "confident"}
    assert 60 <= reasons.count("audit") <= 140  # 100 expected; 4.6 standard deviations
    cloud_before = cloud.submitted
    plain = Hybrid(edge, cloud, Policy(GENEROUS_MS, min_margin=0.5))
    assert {plain.infer({"x": SURE}).reason for _ in range(50)} == {"confident"}
    assert cloud.submitted == cloud_before


def test_sides_that_agree_are_no_drift_and_sides_that_differ_are_told_once(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, **EVERY))
    events = []
    hybrid.on_event(events.append)
    audited(hybrid, cloud, 30)
    assert events == []
    cloud.gain = np.float32(-1.0)  # now it says something else
    audited(hybrid, cloud, 30)
    assert [event.name for event in events] == ["drift"]
    fields = events[0].fields
    assert (fields["sample"], fields["bound"], fields["share"]) == ("audit", 0.01, 1.0)
    assert 1 <= fields["answers"] <= 30


def test_the_callers_array_may_change_as_soon_as_it_has_its_answer(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, **EVERY))
    events, x = [], SURE.copy()
    hybrid.on_event(events.append)
    for _ in range(20):
        cloud.hold()
        before = cloud.finished
        prediction = hybrid.infer({"x": x})
        x[:] = -x  # a camera's buffer
        prediction.outputs["logits"][:] = 0.0
        cloud.let_go()
        until(lambda: cloud.finished > before)  # noqa: B023
        x[:] = SURE
    assert events == []


def test_a_failed_audit_speaks_of_the_cloud_and_not_of_the_edge(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, failures_in_a_row=3, **EVERY))
    cloud.error = lambda: RemoteUnavailable("down")
    audited(hybrid, cloud, 3)
    assert hybrid._cloud.breaker.until_s is not None
    assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")  # the circuit is open: no audit
    assert cloud.submitted == 3


def test_audits_keep_the_budget_and_what_is_private_stays(edge, cloud, tmp_path, monkeypatch):
    card, write = threading.Event(), Spending._write

    def write_late(self, *args):
        assert card.wait(120.0)
        write(self, *args)

    monkeypatch.setattr(Spending, "_write", write_late)
    policy = Policy(GENEROUS_MS, budget=Budget(requests_per_day=3), **EVERY)
    with Hybrid(edge, cloud, policy, state=tmp_path) as hybrid:
        assert told(hybrid.infer({"x": SURE}, private=True)) == ("edge", "confident")
        # An audit waits for no card: it begins to write.
        assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
        card.set()
        until(lambda: hybrid._own_meter._spending._writing is None)
        audited(hybrid, cloud, 3)
        assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
        assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "budget_spent")
    assert cloud.submitted == 3


def test_a_cloud_that_was_never_reached_is_not_waited_for_by_an_audit(edge):
    silent = ConnectingRunner(down=True)
    hybrid = Hybrid(edge, silent, Policy(GENEROUS_MS, **EVERY))
    for _ in range(5):
        assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
    assert (silent.submitted, silent.connects) == (0, 1)
    silent.close()


def test_what_may_differ_is_the_policys_else_the_certificates_else_audits_are_refused(edge, cloud):
    for nothing in (None, {}, {"may_differ": {}}):
        edge.variant, edge.offload = "v", certified(nothing)
        with pytest.raises(ConfigError, match="audit_share"):
            Hybrid(edge, cloud, Policy(GENEROUS_MS, audit_share=0.1))
    edge.variant, edge.offload = "v", certified({"may_differ": MAY_DIFFER})
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, audit_share=1.0))
    events = []
    hybrid.on_event(events.append)
    cloud.gain = np.float32(-1.0)
    audited(hybrid, cloud, 20)
    assert [(event.fields["sample"], event.fields["bound"]) for event in events] == [("audit", 0.01)]
    assert events[0].fields["variant"] == "v"


# --- the offloaded ones


def test_uncertain_answers_that_differ_more_than_the_export_saw_are_told(edge, cloud):
    edge.variant, edge.offload = "v", certified({"may_differ": MAY_DIFFER})
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS))
    events = []
    hybrid.on_event(events.append)
    for _ in range(100):
        assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert events == []
    cloud.gain = np.float32(-1.0)
    for _ in range(200):
        hybrid.infer({"x": UNSURE})
    assert [(event.name, event.fields["sample"]) for event in events] == [("drift", "uncertain")]
    assert events[0].fields["bound"] == 0.3


def test_in_a_batch_only_the_rows_that_are_asked_for_are_compared():
    batch = np.concatenate([SURE, UNSURE])
    edge, cloud = {"logits": batch}, {"logits": np.concatenate([-SURE, UNSURE])}
    assert differing(SCORE, edge, cloud, np.array([False, True])) == 0.0
    assert differing(SCORE, edge, cloud, np.array([True, True])) == 0.5
    assert differing(SCORE, edge, cloud, np.array([False, False])) is None


def test_of_a_batch_the_confident_rows_are_no_evidence_about_the_uncertain(edge, cloud):
    """Row 0 is confident and always differs, row 1 is uncertain and never does."""
    edge.variant, edge.offload = "v", certified({"may_differ": MAY_DIFFER})
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS))
    events = []
    hybrid.on_event(events.append)
    cloud.gain = np.array([[-1.0], [1.0]], dtype=np.float32)  # by row
    for _ in range(200):
        assert told(hybrid.infer({"x": np.concatenate([SURE, UNSURE])})) == ("cloud", "uncertain")
    assert events == []


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        3,
        {"may_differ": None},
        {"may_differ": []},
        *({"may_differ": {"kept": bad}} for bad in ("much", True, 0.0, 1.0, -0.1, float("nan"), None)),
    ],
)
def test_what_the_export_did_not_write_bounds_nothing(entry):
    assert may_differ(certified(entry), "v", "kept") is None
    assert may_differ(certified({"may_differ": MAY_DIFFER}), "another", "kept") is None
    assert may_differ(None, "v", "kept") is None


@pytest.mark.parametrize(
    ("score", "edge_shape", "cloud_shape"),
    [
        (Score(kind="detection", output="logits"), (1, 4), (1, 4)),
        (SCORE, (1, 4), (1, 5)),
        (SCORE, (1, 1), (1, 1)),
        (SCORE, (0, 4), (0, 4)),
        (Score(output="else"), (1, 4), (1, 4)),
    ],
)
def test_where_there_is_no_class_nothing_is_compared(score, edge_shape, cloud_shape):
    edge, cloud = ({"logits": np.zeros(shape, np.float32)} for shape in (edge_shape, cloud_shape))
    assert differing(score, edge, cloud, np.ones(edge_shape[0], bool)) is None


def test_of_several_places_any_may_differ():
    edge = {"logits": np.zeros((2, 3, 4), np.float32)}
    cloud = {"logits": np.zeros((2, 3, 4), np.float32)}
    cloud["logits"][1, 2, 3] = 1.0
    assert differing(SCORE, edge, cloud, np.ones(2, bool)) == 0.5
