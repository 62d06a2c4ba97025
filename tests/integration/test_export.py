"""The whole way from a trained network to a bundle, and the ways in which nothing may be written."""

from __future__ import annotations

import copy
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from outrider import cli
from outrider.bundle import generate_key, load_golden, open_bundle, public_bytes, save_keypair
from outrider_exporters import Distill, MaxDrop, MaxSize, MinMetric, Prune, Quantize, Recipe
from outrider_runtimes.errors import ExportError, GateMissed
from support.exporters import LABELS, Small, accuracy, digits, fit, run, trained

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "docs/recipes/digits/recipe.toml"
WHOLE = Recipe([Prune(ratio=0.5), Distill(temperature=4.0, epochs=8, learning_rate=3e-3), Quantize("int8")])
VARIANTS = ["onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8"]


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def model(data):
    return trained(Small, data, seed=0, epochs=8)


@pytest.fixture(scope="module")
def teacher(data):
    return trained(lambda: Small(width=32), data, seed=1, epochs=8)


def whole(model, teacher, data, output, **options):
    return run(
        model, data, output, fit=fit, teacher=teacher, recipe=WHOLE, formats=("onnx", "tflite"), seed=3, **options
    )


@pytest.fixture(scope="module")
def key():
    return generate_key()


@pytest.fixture(scope="module")
def exported(model, teacher, data, key, tmp_path_factory):
    """(report, progress events, the model's weights from before)"""
    before = copy.deepcopy(model.state_dict())
    events = []
    report = whole(
        model,
        teacher,
        data,
        tmp_path_factory.mktemp("export") / "digits.outrider",
        gates=[MaxDrop("accuracy", points=3.0), MinMetric("accuracy", at_least=0.85), MaxSize(60_000)],
        labels=LABELS,
        version=7,
        signing_keys=[key],
        progress=events.append,
    )
    return report, events, before


def leftovers(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


# --- what comes out


def test_the_bundle_holds_every_variant_and_says_what_it_is(exported, key):
    report, _, _ = exported
    with open_bundle(report.bundle) as bundle:
        manifest = bundle.manifest
        assert (manifest.name, manifest.version, manifest.digest) == ("digits", 7, report.digest)
        assert [variant.name for variant in manifest.variants] == VARIANTS
        assert manifest.interface.labels == LABELS
        assert [spec.name for spec in manifest.interface.outputs] == ["logits"]
        assert [signature.public_key for signature in bundle.signatures] == [public_bytes(key)]
        assert manifest.provenance["targets"] == []
        assert Recipe.from_dict(manifest.provenance["recipe"]) == WHOLE
        assert [stage["name"] for stage in manifest.provenance["stages"]] == ["prune", "distill"]
        for variant in manifest.variants:
            assert variant.measured["metrics"] == report.variant(variant.name).metrics
            assert variant.measured["latency_host_ms_p50"] > 0
            assert variant.measured["targets"] == {}
        assert manifest.provenance["environment"] == report.environment
    assert report.size_bytes == report.bundle.stat().st_size


def test_no_path_and_no_name_of_this_machine_is_in_the_bundle(exported):
    report, _, _ = exported
    raw = report.bundle.read_bytes()
    for path in (str(Path.cwd()), str(Path.home()), str(report.bundle.parent), "outrider-export-"):
        assert path.encode() not in raw
    assert f'"{platform.node()}"'.encode() not in raw


def test_golden_rows_come_from_the_test_part(exported, data):
    report, _, _ = exported
    assert report.golden == {"rows": 64, "from": "test", "trained_on": 0}
    with open_bundle(report.bundle) as bundle:
        decision = bundle.manifest.golden.decision
        golden = load_golden(bundle.read, bundle.manifest)
    assert (decision.kind, decision.output) == ("argmax", "logits")
    seen = {row.tobytes() for row in data.test[0]["image"]}
    trained_on = {row.tobytes() for row in data.train[0]["image"]}
    rows = {row.tobytes() for row in golden.inputs["image"]}
    assert rows <= seen
    assert not rows & (trained_on - seen)


def test_the_network_is_really_smaller_and_every_stage_was_measured(exported):
    report, _, _ = exported
    prune, distill = report.stages
    assert [stage.name for stage in report.stages] == ["prune", "distill"]
    assert prune.parameters < report.baseline.parameters / 2
    assert prune.macs < report.baseline.macs / 2
    assert (distill.parameters, distill.macs) == (prune.parameters, prune.macs)
    assert prune.detail["ratio_reached"] == 0.5
    assert report.baseline.metrics["accuracy"] > 0.85
    assert all(stage.seconds > 0 for stage in report.stages)


def test_each_variant_is_the_network_up_to_its_precision(exported):
    report, _, _ = exported
    for variant in report.variants:
        assert variant.parity <= (1e-4 if variant.precision == "float32" else 0.1)
        assert variant.metrics["accuracy"] >= report.baseline.metrics["accuracy"] - 0.03
    for kind in ("onnx", "tflite"):
        assert report.variant(f"{kind}-int8").size_bytes < report.variant(f"{kind}-float32").size_bytes
        assert report.variant(f"{kind}-float32").metrics == report.stages[-1].metrics


def test_report_and_manifest_say_how_alike_a_quantized_variant_answers(exported, data):
    report, _, _ = exported
    with open_bundle(report.bundle) as bundle:
        measured = {variant.name: variant.measured for variant in bundle.manifest.variants}
    shown = {variant["name"]: variant for variant in report.to_dict()["variants"]}
    for kind in ("onnx", "tflite"):
        assert measured[f"{kind}-float32"]["likeness"] is None
        likeness = measured[f"{kind}-int8"]["likeness"]
        assert likeness == shown[f"{kind}-int8"]["likeness"]
        assert likeness["rows"] == len(data.test[1])
        assert likeness["snr_db"] > 10.0
        assert 0.0 <= likeness["changed"] < 0.1


def test_every_gate_was_judged_on_every_variant(exported):
    report, _, _ = exported
    assert len(report.gates) == 3 * len(VARIANTS)
    assert all(result.passed for result in report.gates)


def test_the_report_is_json(exported):
    report, _, _ = exported
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["bundle"] == {"path": str(report.bundle), "digest": report.digest, "size_bytes": report.size_bytes}
    assert [variant["name"] for variant in found["variants"]] == VARIANTS
    with pytest.raises(KeyError):
        report.variant("onnx-int4")


def test_the_users_model_is_unchanged_bit_for_bit(exported, model):
    _, _, before = exported
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_progress_tells_of_every_part(exported):
    _, events, _ = exported
    steps = list(dict.fromkeys(event.step for event in events))
    assert steps == ["baseline", "passes", "prune", "distill", "convert", "measure", "latency", "bundle"]
    assert all(0 <= event.done <= event.total for event in events)
    assert [event.message for event in events if event.step == "convert"] == VARIANTS


def untimed(value):
    """A manifest's data without what was timed."""
    if isinstance(value, dict):
        timed = ("latency", "seconds", "gain", "note", "quantization")
        return {key: untimed(item) for key, item in value.items() if not any(word in key for word in timed)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def test_the_same_seed_gives_the_same_files(exported, model, teacher, data, tmp_path):
    """And but for what was timed, the same manifest."""
    report, _, _ = exported
    torch.manual_seed(99)
    gates = [MaxDrop("accuracy", points=3.0), MinMetric("accuracy", at_least=0.85), MaxSize(60_000)]
    again = whole(
        model, teacher, data, tmp_path / "again.outrider", labels=LABELS, version=7, name="digits", gates=gates
    )
    with open_bundle(report.bundle) as first, open_bundle(again.bundle) as second:
        members = [{m.path: m.sha256 for m in bundle.manifest.members} for bundle in (first, second)]
        assert first.manifest.interface.digest == second.manifest.interface.digest
        texts = [untimed(json.loads(bundle.manifest.raw)) for bundle in (first, second)]
    assert members[0] == members[1]
    assert texts[0] == texts[1]


def test_a_device_loads_it_and_answers(exported, key, data, tmp_path):
    import outrider

    report, _, _ = exported
    save_keypair(tmp_path / "keys", "release", key)
    inputs, targets = data.test
    with outrider.load(report.bundle, trust=tmp_path / "keys", state=tmp_path / "state") as model:
        p = model.infer({"image": inputs["image"][:1]})
        assert p.verified
        assert p.outputs["logits"].shape == (1, 10)
        right = model.predict({"image": inputs["image"]})["logits"].argmax(-1) == targets
        assert right.mean() == pytest.approx(report.variant(model.variant).metrics["accuracy"], abs=0.005)


def test_a_network_without_a_recipe_is_exported_as_it_is(model, data, tmp_path):
    report = run(model, data, tmp_path / "plain.outrider")
    assert report.stages == ()
    assert [variant.name for variant in report.variants] == ["onnx-float32"]
    assert report.variants[0].metrics == report.baseline.metrics
    assert report.name == "plain"


def test_an_older_bundle_is_replaced(model, data, tmp_path):
    first = run(model, data, tmp_path / "a.outrider", version=1)
    second = run(model, data, tmp_path / "a.outrider", version=2)
    assert first.digest != second.digest
    with open_bundle(tmp_path / "a.outrider") as bundle:
        assert bundle.manifest.version == 2


# --- when nothing may be written


def test_a_missed_gate_writes_nothing_and_says_what_lost_it(model, data, tmp_path):
    def forgets(network, train):
        with torch.no_grad():
            network.head[4].bias.add_(torch.tensor([9.0] + [0.0] * 9))

    (tmp_path / "old.outrider").write_bytes(b"old")
    with pytest.raises(GateMissed) as caught:
        run(
            model,
            data,
            tmp_path / "old.outrider",
            fit=forgets,
            recipe=Recipe([Prune(ratio=0.5)]),
            gates=[MaxSize(10**6), MaxDrop("accuracy", points=1.0)],
        )
    text = str(caught.value)
    assert "onnx-float32 missed max_drop: accuracy is 0." in text
    assert "at most 1 are allowed" in text
    assert "most was lost after prune; baseline 0." in text
    assert "MaxSize" not in text
    assert "no bundle was written" in caught.value.hint
    assert (tmp_path / "old.outrider").read_bytes() == b"old"
    assert leftovers(tmp_path) == ["old.outrider"]


def test_a_missed_size_names_the_bytes(model, data, tmp_path):
    with pytest.raises(GateMissed, match=r"onnx-float32 missed max_size: the file has \d+ bytes, at most 100 are"):
        run(model, data, tmp_path / "a.outrider", gates=[MaxSize(100)])
    assert leftovers(tmp_path) == []


def failing_at(call):
    """An evaluate that fails at its n-th call: 1 is the original model, 2 the first variant."""
    calls = []

    def evaluate(predict, test):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("no labels here")
        return accuracy(predict, test)

    return evaluate


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (failing_at(1), r"evaluate raised RuntimeError \(the original model\): no labels here"),
        (failing_at(2), r"evaluate raised RuntimeError \(variant onnx-float32\): no labels here"),
        (lambda predict, test: {"accuracy": float("nan")}, r"accuracy = nan \(the original model\)"),
        (lambda predict, test: 0.9, r"expected figures by name"),
        (lambda predict, test: accuracy(lambda x: predict({"img": x["image"]}), test), "'image' is missing"),
    ],
)
def test_an_evaluate_that_fails_ends_the_export(model, data, tmp_path, evaluate, words):
    with pytest.raises(ExportError, match=words):
        run(model, data, tmp_path / "a.outrider", evaluate=evaluate)
    assert leftovers(tmp_path) == []


def test_ctrl_c_in_the_middle_of_fine_tuning_leaves_nothing(data, tmp_path):
    """A real SIGINT to a real process that has begun to train."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from support.exporters import Small, digits, run\n"
        "from outrider_exporters import Prune, Recipe\n"
        "def fit(model, train):\n"
        "    print('training', flush=True)\n"
        "    time.sleep(280)\n"
        "run(Small().eval(), digits(), sys.argv[1], fit=fit, recipe=Recipe([Prune(ratio=0.5)]))\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TMPDIR": str(tmp_path / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out/a.outrider")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    watchdog = threading.Timer(250, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert leftovers(tmp_path / "out") == []
    assert leftovers(tmp_path / "tmp") == []


def test_ctrl_c_while_variants_are_measured_leaves_nothing(model, data, tmp_path, monkeypatch):
    calls = []

    def evaluate(predict, test):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(predict, test)

    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "out/a.outrider", evaluate=evaluate)
    assert leftovers(tmp_path / "out") == leftovers(tmp_path / "tmp") == []


def test_a_network_that_answers_at_random_is_refused(model, data, tmp_path):
    class Noisy(Small):
        def forward(self, image):
            return super().forward(image) + torch.rand(image.shape[0], 10)

    with pytest.raises(ExportError):
        run(Noisy().eval(), data, tmp_path / "a.outrider")
    assert leftovers(tmp_path) == []


def test_a_model_in_training_mode_is_exported_in_evaluation_mode(model, data, tmp_path):
    training = copy.deepcopy(model).train()
    report = run(training, data, tmp_path / "a.outrider")
    assert training.training
    assert report.baseline.metrics == accuracy_of(model, data)


def accuracy_of(model, data):
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    interface = interface_from_module(model, {"image": data.test[0]["image"][:1]}, ["logits"])
    return accuracy(torch_predict(model, interface), data.test)


# --- the command line


def test_the_example_recipe_becomes_a_bundle(tmp_path, capsys):
    key = generate_key()
    private, _ = save_keypair(tmp_path / "keys", "release", key)
    output = tmp_path / "digits.outrider"
    assert cli.main(["export", str(RECIPE), "--output", str(output), "--key", str(private), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["bundle"]["path"] == str(output)
    assert [choice["target"] for choice in result["choices"]] == ["pi4", "pi5"]
    kinds = [(variant["format"], variant["precision"]) for variant in result["variants"]]
    assert len(kinds) == 3
    assert {("onnx", "int8"), ("tflite", "int8")} < set(kinds)
    assert "distill: epoch 1 of 20" in printed.err
    with open_bundle(output) as bundle:
        assert [signature.public_key for signature in bundle.signatures] == [public_bytes(key)]


def test_package_makes_a_bundle_of_a_file(model, data, tmp_path, capsys):
    from outrider_exporters.convert.onnx import to_onnx
    from outrider_exporters.sources.module import interface_from_module

    example = {"image": data.test[0]["image"][:2]}
    to_onnx(model, interface_from_module(model, example, ["logits"]), example, tmp_path / "net.onnx")
    output = tmp_path / "net.outrider"
    command = ["package", str(tmp_path / "net.onnx"), "--output", str(output), "--name", "net", "--version", "3"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["version"]) == ("net", 3)
    assert cli.main([*command, "--name", "other"]) == 0
    assert "other version 3" in capsys.readouterr().out
