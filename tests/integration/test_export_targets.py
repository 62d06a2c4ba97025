"""Exports for targets, with a report: what is chosen, what is said, and who is blamed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from outrider import cli
from outrider.bundle import load_golden, open_bundle
from outrider_exporters import MaxDrop, MaxLatency, MaxParityError, Quantize, Recipe
from outrider_runtimes.board import this_board
from outrider_runtimes.errors import ConfigError, GateMissed
from outrider_runtimes.targets import native_target
from support.exporters import Small, accuracy, digits, run, trained

pytestmark = pytest.mark.slow

INT8 = Recipe([Quantize("int8")])


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def model(data):
    return trained(Small, data, seed=0, epochs=8)


@pytest.fixture(scope="module")
def exported(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    report = run(
        model,
        data,
        folder / "digits.outrider",
        recipe=INT8,
        formats=("onnx", "tflite"),
        targets=("native", "pi5", "pi-32bit"),
        gates=[MaxDrop("accuracy", points=3.0), MaxParityError(share=0.2)],
        report=folder / "report.html",
        golden={"image": data.test[0]["image"][:5]},
    )
    return report, folder


def test_each_target_gets_at_most_three_that_it_can_run(exported):
    report, _ = exported
    by_target = {choice.target: choice for choice in report.choices}
    assert set(by_target) == {"native", "pi5", "pi-32bit"}
    assert all(1 <= len(choice.kept) <= 3 for choice in report.choices)
    assert by_target["native"].measured
    assert not by_target["pi5"].measured
    assert all(report.variant(name).format == "tflite" for name in by_target["pi-32bit"].kept)
    assert not any("u8s8" in report.variant(name).scheme for name in by_target["pi5"].kept)
    kinds = {(report.variant(name).format, report.variant(name).precision) for name in by_target["pi5"].kept}
    assert {("onnx", "int8"), ("tflite", "int8")} < kinds


def test_nothing_slower_than_float_is_kept_silently_for_this_host(exported):
    report, _ = exported
    (native,) = [choice for choice in report.choices if choice.target == "native"]
    measured = {v.name: v.latency_host_ms_p50 for v in (*report.variants, *report.passed_over)}
    fastest = min(ms for name, ms in measured.items() if name.endswith("float32"))
    for name in native.kept:
        if not name.endswith("float32") and measured[name] > fastest:
            assert "no faster than float32" in report.variant(name).note
    for name, reason in native.dropped.items():
        if "slower than float32" in reason:
            assert f"{measured[name]:.3f} ms" in reason


def test_every_candidate_that_is_not_in_the_bundle_has_a_reason(exported):
    report, _ = exported
    assert {v.name for v in report.passed_over} == set(report.dropped)
    if native_target(this_board()).int8_scheme == "U8S8":
        names = {v.name for v in (*report.variants, *report.passed_over)}
        assert {"onnx-int8-u8s8", "onnx-int8-u8s8-per-tensor"} <= names


def test_the_bundle_says_for_which_target_and_what_was_passed_over(exported):
    report, _ = exported
    with open_bundle(report.bundle) as bundle:
        provenance = bundle.manifest.provenance
        assert [choice["target"] for choice in provenance["choices"]] == ["native", "pi5", "pi-32bit"]
        assert provenance["passed_over"] == report.dropped
        assert {v.name for v in bundle.manifest.variants} == {v.name for v in report.variants}
        for variant in bundle.manifest.variants:
            assert variant.measured["targets"] == report.variant(variant.name).targets
            if set(variant.measured["targets"]) == {"pi5"}:
                assert variant.measured["targets"] == {"pi5": "unmeasured"}


def test_the_callers_rows_are_the_golden_ones(exported, data):
    report, _ = exported
    assert report.golden == {"rows": 5, "from": "given", "trained_on": 0}
    with open_bundle(report.bundle) as bundle:
        golden = load_golden(bundle.read, bundle.manifest)
    np.testing.assert_array_equal(golden.inputs["image"], data.test[0]["image"][:5])


def test_the_report_is_written_as_a_page_and_as_json(exported):
    report, folder = exported
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "Quantization error by layer" in page
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert set(stored["layers"]) == {v.name for v in report.variants if v.precision != "float32"}
    assert all(
        {"features.0", "features.3"} <= {item["layer"] for item in layers} for layers in stored["layers"].values()
    )


def test_a_form_that_nobody_asked_for_and_that_cannot_be_measured_is_left_out(model, data, tmp_path):
    steps = []

    def evaluate(predict, test):
        if steps[-1].message == "tflite-dynamic-per-tensor":
            raise ValueError("these answers are none")
        return accuracy(predict, test)

    report = run(
        model,
        data,
        tmp_path / "digits.outrider",
        recipe=Recipe([Quantize("dynamic")]),
        formats=("tflite",),
        targets=("pi-32bit",),
        evaluate=evaluate,
        progress=steps.append,
    )
    assert "these answers are none" in report.dropped["tflite-dynamic-per-tensor"]
    assert report.bundle.is_file()


# --- a missed gate


@pytest.fixture(scope="module")
def fragile(model, data):
    """The same function in floats: one channel is large, and its reader takes it back. Int8 sees that channel alone."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        active = broken.features[:2](torch.from_numpy(data.test[0]["image"])).mean((0, 2, 3))
        large = int(torch.where(active > 0, active, torch.inf).argmin())  # it says the least, but something
        broken.features[0].weight[large] *= 30000.0
        broken.features[0].bias[large] *= 30000.0
        broken.features[3].weight[:, large] /= 30000.0
    return broken


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_missed_gate_names_the_layer_to_blame_and_leaves_a_report(fragile, data, tmp_path, kind):
    """The second gate is one that int8 cannot meet with any layer in float."""
    with pytest.raises(GateMissed) as caught:
        run(
            fragile,
            data,
            tmp_path / "a.outrider",
            recipe=INT8,
            formats=(kind,),
            gates=[MaxDrop("accuracy", points=1.0), MaxParityError(share=1e-5)],
            report=tmp_path / "report.html",
        )
    text = str(caught.value)
    assert f"{kind}-int8 missed max_drop: accuracy is 0." in text
    assert f"most was lost in {kind}-int8" in text
    assert "quantization error grows most in features.3 (" in text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert "No bundle was written" in (tmp_path / "report.html").read_text()


def test_a_latency_of_another_architecture_is_refused_before_any_work(model, data, tmp_path):
    def never(predict, test):
        raise AssertionError("evaluate ran")

    with pytest.raises(ConfigError, match="latency is measured on this host"):
        run(
            model,
            data,
            tmp_path / "a.outrider",
            evaluate=never,
            targets=("pi4", "x86-avx2"),
            gates=[MaxLatency(ms=1.0)],
        )


def test_a_missed_latency_names_the_milliseconds(model, data, tmp_path):
    with pytest.raises(GateMissed, match=r"onnx-float32 missed max_latency: one row takes \d+\.\d+ ms on this host"):
        run(model, data, tmp_path / "a.outrider", targets=("native",), gates=[MaxLatency(ms=0.0)])


# --- the command line


RECIPE = """
formats = ["onnx"]
[model]
source = "targets_case:build"
[[gates]]
type = "max_drop"
metric = {name = "error", higher_is_better = false}
points = 100.0
"""
MODULE = """
from support.exporters import Small, random_data
import numpy as np

def evaluate(predict, test):
    return {"error": float((predict(test[0])["logits"].argmax(-1) != test[1]).mean())}

def build():
    data = random_data()
    golden = {"image": data.train[0]["image"][:2]}
    return {"model": Small().eval(), "example": {"image": np.zeros((1, 1, 8, 8), np.float32)}, "outputs": ["logits"],
            "data": data, "evaluate": evaluate, "golden": golden}
"""


def test_the_command_line_writes_the_report_with_its_command(tmp_path, capsys):
    (tmp_path / "targets_case.py").write_text(MODULE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command = ["export", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "a.outrider")]
    command += ["--report", str(tmp_path / "a.html")]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["command"] == " ".join(["outrider", *command])
    assert result["golden"] == {"rows": 2, "from": "given", "trained_on": 2}
    assert result["command"] in (tmp_path / "a.html").read_text()
    assert json.loads((tmp_path / "a.json").read_text()) == result
