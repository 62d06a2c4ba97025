"""Hybrid judges an answer by what gave it: a step of the ladder or a rollback may come between submit and answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.admit.admission import remembered
from outrider.bundle import OffloadRule
from outrider.installer import install
from outrider.model import Model, load
from outrider.opening import Opened, Wanted, open_choice
from outrider.policy import Policy
from outrider.serving import Serving
from outrider.store import Store
from outrider_runtimes.runner import Served
from outrider_runtimes.scores import Score
from support import tinymodels
from support.realbundles import ONNX, TFLITE, images, make_real_bundle
from support.runners import NumpyRunner, told
from support.sides import SURE, UNSURE, Hybrid

POLICY = Policy(60_000.0)
KEEPS_ALL, KEEPS_NONE = -1.0, 2.0  # of a margin, 0 to 1
X = images(1)
BAD = X + 2.0  # what a moody model does not bear


def rule(**thresholds: float) -> OffloadRule:
    by_variant = {name.replace("_", "-"): value for name, value in thresholds.items()}
    return OffloadRule(score=Score(output="logits"), alpha=0.01, delta=0.1, rows=1000, thresholds=by_variant)


def served(variant: str, bundle: str = "1" * 64) -> Served:
    return Served(variant=variant, engine="numpy", bundle=bundle, verified=False)


@pytest.fixture
def edge(edge):
    edge.bundle, edge.variant, edge.offload = "1" * 64, "large", rule(large=0.5, small=KEEPS_NONE)
    return edge


def test_the_variant_that_answered_is_judged_not_the_one_that_served_before(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    edge.served = served("large")
    assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")
    edge.served = served("small")  # it stepped down under the call; `edge.variant` is what it was before
    assert told(hybrid.infer({"x": SURE})) == ("cloud", "uncertain")


@pytest.mark.parametrize("answered", [served("unheard-of"), served("large", bundle="2" * 64)])
def test_a_variant_or_a_bundle_that_nothing_was_certified_of_is_not_judged(edge, cloud, answered):
    edge.served = answered
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": UNSURE})) == ("edge", "edge")


def test_the_callers_own_rule_judges_whatever_answered(edge, cloud):
    edge.served = served("unheard-of", bundle="2" * 64)
    hybrid = Hybrid(edge, cloud, Policy(60_000.0, min_margin=0.5))
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert told(hybrid.infer({"x": SURE})) == ("edge", "confident")


# --- real models


class Stepping:
    """A model of two variants whose steps are the test's."""

    def __init__(self, folder: Path) -> None:
        kept = rule(onnx_float32=KEEPS_ALL, tflite_float32=KEEPS_NONE)
        make_real_bundle(folder / "b.outrider", formats=("onnx", "tflite"), offload=kept)
        install(folder / "b.outrider", state=folder / "state")
        self.installed = Store(folder / "state").installed("tiny")
        opened = self.open(ONNX)
        self.serving = Serving(opened)
        self.model = Model(
            self.serving,
            bundle=opened.info,
            variant=ONNX,
            engine=opened.choice.engine,
            threads=1,
            offload=self.installed.manifest.offload,
        )

    def open(self, variant: str) -> Opened:
        (admission, *_) = remembered(self.installed.choice)
        return open_choice(self.installed, admission, Wanted(variant=variant), verified=False)

    def step(self, variant: str, kind: str) -> None:
        self.serving.replace(self.open(variant), kind=kind, reason="the test says so")


@pytest.fixture
def stepping(tmp_path: Path) -> Iterator[Stepping]:
    stepping = Stepping(tmp_path)
    yield stepping
    stepping.model.close()


@pytest.mark.slow
def test_each_rung_of_a_ladder_is_judged_by_its_own_threshold(stepping: Stepping) -> None:
    cloud = NumpyRunner(interface=stepping.model.interface)
    cloud.error = lambda: RuntimeError("it is asked, and that is all that counts here")
    hybrid = Hybrid(stepping.model, cloud, POLICY)
    events = []
    off = hybrid.on_event(events.append)
    assert told(hybrid.infer(X)) == ("edge", "confident")
    stepping.step(TFLITE, "step_down")
    prediction = hybrid.infer(X)
    assert told(prediction) == ("edge_degraded", "cloud_failed")
    assert prediction.variant == TFLITE
    stepping.step(ONNX, "step_up")
    assert told(hybrid.infer(X)) == ("edge", "confident")
    assert [(event.name, event.fields["variant_before"], event.fields["variant"]) for event in events] == [
        ("step_down", ONNX, TFLITE),
        ("step_up", TFLITE, ONNX),
    ]
    assert events[0].fields["reason"] == "the test says so"
    off()
    stepping.step(TFLITE, "step_down")
    assert len(events) == 2
    hybrid.on_event(events.append)
    hybrid.close()
    stepping.step(ONNX, "step_up")
    assert len(events) == 2
    cloud.close()


@pytest.mark.slow
@pytest.mark.parametrize("last_good_has_a_rule", [True, False])
def test_after_a_rollback_the_rule_is_that_of_what_serves(tmp_path: Path, last_good_has_a_rule: bool) -> None:
    """The fresh bundle keeps everything, the last good one nothing, or says nothing of it."""
    old = rule(onnx_float32=KEEPS_NONE) if last_good_has_a_rule else None
    good = make_real_bundle(tmp_path / "1.outrider", version=1, seed=1, offload=old)
    moody = tinymodels.moody_onnx(tinymodels.weights(2), "nan", above=1.5)
    fresh = make_real_bundle(
        tmp_path / "2.outrider",
        version=2,
        seed=2,
        files={"onnx": moody},
        offload=rule(onnx_float32=KEEPS_ALL),
        cloud_only=True,
    )
    install(tmp_path / "1.outrider", state=tmp_path)
    install(tmp_path / "2.outrider", state=tmp_path)
    cloud = NumpyRunner()
    with load("tiny", state=tmp_path) as model:
        cloud.interface = model.interface
        cloud.error = lambda: RuntimeError("it is asked, and that is all that counts here")
        hybrid = Hybrid(model, cloud, Policy(60_000.0, obey_cloud_only=False))
        events = []
        hybrid.on_event(events.append)
        assert model.cloud_only
        first = hybrid.infer(X)
        assert (told(first), first.bundle) == (("edge", "confident"), fresh)
        expected = ("edge_degraded", "cloud_failed") if last_good_has_a_rule else ("edge", "edge")
        for x in (BAD, X):  # the call that goes back, and the next one
            prediction = hybrid.infer(x)
            assert (told(prediction), prediction.bundle) == (expected, good)
        assert not model.cloud_only
        assert (model.offload is not None) == last_good_has_a_rule
        assert [(event.name, event.fields["bundle"]) for event in events] == [("rollback", good)]
        hybrid.close()
    cloud.close()
