"""A certified threshold, from the export to a board that obeys it and asks a bigger model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import outrider
from outrider.bundle import open_bundle
from outrider_exporters import Data, MinMetric, Offload, Quantize, Recipe, export
from outrider_runtimes.errors import ConfigError, ExportError, GateMissed

pytestmark = pytest.mark.slow

ALPHA, DELTA = 0.05, 0.1


def task(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of three overlapping clouds: float32 [N, 2], classes int64 [N]. No network is right on all of them."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, rows)
    centres = np.array([[0.0, 0.0], [2.2, 0.0], [0.0, 2.2]])
    return (centres[classes] + rng.standard_normal((rows, 2))).astype(np.float32), classes


def trained(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    x, y = task(3000, 1)
    network = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(200 if width > 4 else 60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    return network


UNEVEN = Data(certification=({"x": task(9, 1)[0]}, task(8, 1)[1]), calibration={"x": task(9, 1)[0]}, test=1)


def accuracy(predict, test):
    return {"accuracy": float((predict(test[0])["logits"].argmax(1) == test[1]).mean())}


def run(folder, **options):
    rows = {"certification": 3000, **{k: options.pop(k) for k in ("certification",) if k in options}}
    certification, targets = task(rows["certification"], 3)
    arguments = {
        "example": {"x": task(1, 0)[0]},
        "outputs": ["logits"],
        "data": Data(
            calibration={"x": task(400, 2)[0]},
            certification=({"x": certification}, targets),
            test=({"x": task(1000, 4)[0]}, task(1000, 4)[1]),
        ),
        "evaluate": accuracy,
        "formats": ("onnx",),
        "recipe": Recipe([Quantize("int8")]),
        "offload": Offload(alpha=ALPHA, delta=DELTA),
        "output": folder / "clouds.outrider",
        **options,
    }
    return export(trained(4, 0), **arguments)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    return run(folder, teacher=trained(64, 1), report=folder / "report.html")


def test_the_bundle_carries_a_threshold_and_a_curve_for_each_variant(exported):
    with open_bundle(exported.bundle) as bundle:
        manifest = bundle.manifest
    rule = manifest.offload
    assert rule is not None
    assert (rule.alpha, rule.delta, rule.rows) == (ALPHA, DELTA, 3000)
    assert set(rule.thresholds) == {"onnx-float32", "onnx-int8"} == set(rule.measured)
    for variant, measured in rule.measured.items():
        chosen = measured["chosen"]
        assert chosen["threshold"] == rule.thresholds[variant]
        assert chosen["accuracy_kept"] >= 1 - ALPHA
        assert 0.0 < chosen["offloaded"] < 1.0
        shares = [point["offloaded"] for point in measured["curve"]]
        assert shares == sorted(shares, reverse=True)
        assert measured["curve"][0]["accuracy_kept"] > measured["curve"][-1]["accuracy_kept"]
        assert measured["curve"][0]["accuracy_together"] >= measured["curve"][-1]["accuracy_together"]
    assert exported.to_dict()["offload"] == rule.to_dict()


def test_fresh_rows_keep_the_promise(exported, tmp_path):
    """On many more rows than certified it: a certificate of 90 % could fail here, this seed's must not by much."""
    x, y = task(50_000, 9)
    with open_bundle(exported.bundle) as bundle:
        rule = bundle.manifest.offload
    for variant, least in rule.thresholds.items():
        with outrider.load(exported.bundle, state=tmp_path, variant=variant) as model:
            outputs = model.predict({"x": x})
        kept = rule.score.rows(outputs) >= least
        assert (outputs["logits"].argmax(1) != y)[kept].mean() <= ALPHA


def test_a_board_obeys_it_and_says_so(exported, tmp_path):
    with (
        outrider.load(exported.bundle, state=tmp_path / "edge") as edge,
        outrider.load(exported.bundle, state=tmp_path / "cloud") as cloud,
    ):
        least = edge.offload.thresholds[edge.variant]
        x, _ = task(60, 11)
        sure = edge.offload.score.rows(edge.predict({"x": x})) >= least
        assert 0 < sure.sum() < len(x)
        hybrid = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0))
        answers = [hybrid.infer({"x": row[None]}) for row in x]
        told = [(answer.source, answer.reason) for answer in answers]
        assert told == [("edge", "confident") if one else ("cloud", "uncertain") for one in sure]
        unjudged = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0, obey_certified=False))
        assert {unjudged.infer({"x": row[None]}).reason for row in x} == {"edge"}
        by_hand = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0, min_margin=1.0))
        assert {by_hand.infer({"x": row[None]}).reason for row in x} == {"uncertain"}


def test_an_answer_without_a_box_is_never_confident(exported, tmp_path):
    """Boxes' scores are what this network gives, cut at 0: where none is above, the board has seen nothing."""

    class Boxes(nn.Module):
        def forward(self, x):
            return torch.relu(x)

    def nothing_is_wrong(outputs, targets):
        return np.zeros(len(targets), bool)

    rng = np.random.default_rng(0)
    x, empty = rng.standard_normal((1000, 2)).astype(np.float32), -np.ones((1, 2), np.float32)
    report = export(
        Boxes(), example={"x": empty}, outputs=["boxes"],
        data=Data(calibration={"x": x}, certification=({"x": x}, np.zeros(1000)), test=(x, x)),
        evaluate=lambda predict, test: {"one": 1.0}, formats=("onnx",), is_wrong=nothing_is_wrong, gates=[],
        offload=Offload(alpha=ALPHA, score="detection"), output=tmp_path / "boxes.outrider",
    )  # fmt: skip
    chosen = report.offload["measured"]["onnx-float32"]["chosen"]
    assert chosen["offloaded"] == pytest.approx(np.mean((x <= 0).all(axis=1)), abs=1e-6)
    with outrider.load(report.bundle, state=tmp_path) as edge, outrider.load(report.bundle, state=tmp_path) as cloud:
        hybrid = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0))
        assert hybrid.infer({"x": empty}).reason == "uncertain"
        assert hybrid.infer({"x": -empty}).reason == "confident"


def test_the_report_shows_it(exported):
    page = (exported.bundle.parent / "report.html").read_text()
    assert "When the cloud is asked" in page
    assert "Certified on 3000 rows by Learn-then-Test" in page
    assert "together with the teacher" in page


def test_too_few_rows_are_refused_with_the_number_that_it_takes(tmp_path):
    with pytest.raises(ExportError, match=r"offload: 40 calibration rows .* it takes 45"):
        run(tmp_path, certification=40)
    with pytest.raises(ExportError, match=r"offload: variant onnx-float32: 150 calibration rows .* about \d+ would"):
        run(tmp_path, certification=150)
    assert not list(tmp_path.iterdir())


def test_a_missed_gate_comes_first(tmp_path):
    with pytest.raises(GateMissed):
        run(tmp_path, certification=60, gates=[MinMetric("accuracy", at_least=0.999)])


def test_other_answers_are_judged_by_the_callers_own_function(tmp_path):
    def far_off(outputs, targets):
        return (outputs["logits"].argmax(1) == 0) & (targets == 2)

    report = run(tmp_path, is_wrong=far_off, recipe=Recipe())
    loose = report.offload["measured"]["onnx-float32"]["chosen"]
    assert loose["accuracy_kept"] >= 1 - ALPHA
    strict = run(tmp_path, recipe=Recipe()).offload["measured"]["onnx-float32"]["chosen"]
    assert loose["offloaded"] < strict["offloaded"]
    with pytest.raises(ConfigError, match=r"is_wrong gave int64 \[3000\], expected bool \[3000\]"):
        run(tmp_path, is_wrong=lambda outputs, targets: targets, recipe=Recipe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": Offload(output="scores")}, "offload.output: score: there is no output 'scores'"),
        ({"data": Data(test=1)}, "offload needs data.certification"),
        (
            {"data": UNEVEN},
            "data.certification has 9 rows of inputs and 8 targets",
        ),
    ],
)
def test_what_is_missing_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **changes)
    with pytest.raises(ConfigError, match="alpha"):
        Offload(alpha=0.0)
    with pytest.raises(ConfigError, match="kind is 'luck'"):
        Offload(score="luck")


def test_a_board_audits_by_what_the_export_wrote_and_an_equal_cloud_is_no_drift(exported, tmp_path):
    with (
        outrider.load(exported.bundle, state=tmp_path / "edge") as edge,
        outrider.load(exported.bundle, state=tmp_path / "cloud") as cloud,
    ):
        for measured in edge.offload.measured.values():
            assert ALPHA < measured["may_differ"]["kept"] < 1.0
            assert 0.0 < measured["may_differ"]["offloaded"] < 1.0
        hybrid = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0, audit_share=1.0))
        events = []
        hybrid.on_event(events.append)
        x, _ = task(200, 12)
        reasons = {hybrid.infer({"x": row[None]}).reason for row in x}
        assert {"audit", "uncertain"} <= reasons <= {"audit", "confident", "uncertain"}
        assert events == []


def test_a_task_of_the_cloud_is_asked_there_first(tmp_path):
    report = run(tmp_path, offload=None, recipe=Recipe(), cloud_only=True)
    with (
        outrider.load(report.bundle, state=tmp_path / "edge") as edge,
        outrider.load(report.bundle, state=tmp_path / "cloud") as cloud,
    ):
        hybrid = outrider.Hybrid(edge, cloud, outrider.Policy(deadline_ms=60_000.0))
        x, _ = task(1, 12)
        prediction = hybrid.infer({"x": x})
        assert (prediction.source, prediction.reason) == ("cloud", "cloud_only")
        private = hybrid.infer({"x": x}, private=True)
        assert (private.source, private.reason) == ("edge_degraded", "private")
