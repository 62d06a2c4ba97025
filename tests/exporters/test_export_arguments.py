"""What ``export`` and the commands refuse at once, before any long work."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from outrider import cli
from outrider_exporters import Data, Distill, MaxDrop, Prune, Quantize, Recipe
from outrider_exporters.deciding import steps_to
from outrider_exporters.packing import decision_for, golden_count
from outrider_exporters.passes import Stage
from outrider_exporters.report import VariantReport
from outrider_exporters.sources.module import interface_from_module
from outrider_runtimes.errors import ConfigError, ExportError, MissingExtra
from outrider_runtimes.golden import DecisionCheck
from support.exporters import Small, random_data, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    return random_data()


@pytest.fixture(scope="module")
def model():
    return Small().eval()


def leftovers(folder):
    return sorted(item.name for item in folder.iterdir())


def never(predict, test):
    raise AssertionError("evaluate ran")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": Recipe([Prune(ratio=0.5)])}, "prune needs fit"),
        ({"recipe": Recipe([Distill()])}, "distill needs a teacher"),
        ({"recipe": Recipe([Quantize()]), "data": Data(test=({}, 1))}, "needs data.calibration"),
        ({"formats": ()}, "formats is"),
        ({"formats": ("onnx", "onnx")}, "formats is"),
        ({"formats": ("pytorch",)}, "formats is"),
        ({"targets": ("pi9",)}, "no target 'pi9'"),
        ({"targets": ("pi-32bit",)}, "target 'pi-32bit' runs tflite"),
        ({"version": 0}, "version is 0"),
        ({"seed": -1}, "seed is -1, expected an integer of 0 or more"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"name": "Digits Net"}, "the bundle's name is 'Digits Net'"),
        ({"labels": ("a", "b")}, "2 labels, output 'logits' has 10 classes"),
        ({"signing_keys": ["secret"]}, r"signing_keys\[0\] is a str"),
        ({"output": "missing/folder/a.outrider"}, "cannot be written"),
        ({"data": {"test": 1}}, "not a Data"),
        ({"evaluate": {"accuracy": 1}}, r"evaluate is {'accuracy': 1}, expected a function"),
    ],
)
def test_what_can_be_refused_at_once_is(model, data, tmp_path, options, words):
    arguments = {"data": data, "output": tmp_path / "a.outrider", "evaluate": never, **options}
    with pytest.raises(ConfigError, match=words):
        run(model, **arguments)
    assert leftovers(tmp_path) == []


def test_gates_are_checked_before_the_passes_run(model, data, tmp_path):
    def must_not_run(network, train):
        raise AssertionError("fit ran")

    with pytest.raises(ConfigError, match=r"gates\[0\] \(max_drop\): there is no metric 'acuracy'"):
        run(
            model,
            data,
            tmp_path / "a.outrider",
            fit=must_not_run,
            recipe=Recipe([Prune(ratio=0.5)]),
            gates=[MaxDrop("acuracy", points=1.0)],
        )


def test_weights_with_nan_are_refused(model, data, tmp_path):
    broken = Small()
    with torch.no_grad():
        broken.features[0].weight[0] = np.nan
    with pytest.raises(ExportError, match=r"'features\.0\.weight' has NaN"):
        run(broken, data, tmp_path / "a.outrider")


def recipe_in(folder, source, module=None):
    folder.mkdir(exist_ok=True)
    if module is not None:
        (folder / f"{source.partition(':')[0]}.py").write_text(module)
    path = folder / "recipe.toml"
    path.write_text(f"[model]\nsource = {source!r}\n")
    return path


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("", None, "model.source is ''"),
        ("nocolon", None, "model.source is 'nocolon'"),
        ("outrider_no_such:build", None, "there is no module 'outrider_no_such'"),
        ("export_case_a:missing", "x = 1\n", "no function 'missing'"),
        ("export_case_b:build", "1 / 0\n", "importing it raised ZeroDivisionError"),
        ("export_case_c:build", "def build():\n    raise ValueError('no data')\n", "raised ValueError: no data"),
        ("export_case_d:build", "def build():\n    return 3\n", "gave a int"),
        ("export_case_e:build", "def build():\n    return {'modle': 3}\n", "unknown key 'modle'"),
        ("export_case_f:build", "def build():\n    return {'model': 3}\n", "gave no 'example'"),
    ],
)
def test_a_source_that_is_wrong_is_named(tmp_path, capsys, source, module, words):
    path = recipe_in(tmp_path / "recipe", source, module)
    assert cli.main(["export", str(path), "--output", str(tmp_path / "a.outrider")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors
    assert str(path.parent) not in sys.path
    assert not (tmp_path / "a.outrider").exists()


def test_a_tool_that_is_not_installed_names_the_pip_command(tmp_path, capsys):
    module = "def build():\n    raise ModuleNotFoundError(\"No module named 'torch'\", name='torch.nn')\n"
    path = recipe_in(tmp_path / "recipe", "export_case_g:build", module)
    assert cli.main(["export", str(path), "--output", str(tmp_path / "a.outrider")]) == 1
    errors = capsys.readouterr().err
    assert "needs the package 'torch'" in errors
    assert "pip install 'outrider[export]'" in errors


def test_a_recipe_with_an_unknown_key_is_refused_before_its_module_is_imported(tmp_path, capsys):
    path = recipe_in(tmp_path / "recipe", "export_case_h:build", "raise AssertionError\n")
    path.write_text(path.read_text() + "[[passes]]\ntype = 'prune'\nratoi = 0.5\n")
    assert cli.main(["export", str(path), "--output", str(tmp_path / "a.outrider")]) == 1
    errors = capsys.readouterr().err
    assert "passes[0].ratoi: unknown key" in errors
    assert "hint: did you mean 'ratio'?" in errors


@pytest.mark.parametrize("command", ["export", "package"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"outrider {command} " in capsys.readouterr().out.partition("example:")[2]


def test_importing_the_package_and_its_commands_is_light():
    code = (
        "import sys, outrider_exporters, outrider_exporters.cli\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'rich', 'numpy', 'litert_torch', 'outrider_exporters.export'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import outrider_exporters.export, outrider_exporters.package\n"
        "from outrider_exporters import *\n"
        "assert callable(export) and callable(package) and callable(outrider_exporters.export)\n"
        "from outrider_exporters.export import LAYER_ROWS\n"
        "assert callable(outrider_exporters.export)\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'rich', 'litert_torch'} & set(sys.modules)\n"
        "assert set(outrider_exporters.__all__) <= set(dir(outrider_exporters))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


# --- small rules


def interface(labels=(), classes=10):
    model = Small()
    model.head[4] = torch.nn.Linear(64, classes)
    return interface_from_module(model, {"image": np.zeros((1, 1, 8, 8), np.float32)}, ["logits"], labels=labels)


def test_the_golden_decision_is_the_class_where_there_are_classes(data):
    blind = Data(test=1)
    regression = dataclasses.replace(data, train=(data.train[0], np.zeros((96, 10))))
    argmax = DecisionCheck(kind="argmax", output="logits", axis=-1, min_agreement=0.9)
    assert decision_for(interface(), data, 64) == argmax
    assert decision_for(interface(labels=tuple("0123456789")), blind, 64) == argmax
    assert decision_for(interface(), data, 8).min_agreement == 0.75
    assert decision_for(interface(), data, 1).min_agreement == 0.0
    assert decision_for(interface(), blind, 64) == DecisionCheck()
    assert decision_for(interface(), regression, 64) == DecisionCheck()
    assert decision_for(interface(classes=1), data, 64) == DecisionCheck()


def test_large_inputs_get_fewer_golden_rows():
    small = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    assert golden_count(small, interface()) == 64
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for side, rows in ((224, 8), (128, 21)):
        large = {"image": np.zeros((1, 3, side, side), np.float32)}
        assert golden_count(large, interface_from_module(model, large, ["logits"])) == rows


def variant(name, accuracy):
    kind, precision = name.split("-")
    return VariantReport(
        name=name,
        format=kind,
        precision=precision,
        scheme="",
        size_bytes=1,
        metrics={"accuracy": accuracy},
        latency_host_ms_p50=1.0,
        parity=0.0,
    )


def test_the_way_to_an_int8_variant_leads_over_its_own_float_file():
    baseline = Stage(name="baseline", metrics={"accuracy": 0.9}, parameters=1, macs=1)
    prune = Stage(name="prune", metrics={"accuracy": 0.8}, parameters=1, macs=1)
    variants = [variant("onnx-float32", 0.7), variant("tflite-float32", 0.6), variant("tflite-int8", 0.5)]
    steps = steps_to(variants[2], baseline, [prune], variants)
    assert [(label, metrics["accuracy"]) for label, metrics in steps] == [
        ("baseline", 0.9),
        ("after prune", 0.8),
        ("in tflite-float32", 0.6),
        ("in tflite-int8", 0.5),
    ]
    assert [label for label, _ in steps_to(variants[0], baseline, [], variants)] == ["baseline", "in onnx-float32"]


def test_a_converter_that_is_missing_is_named_before_any_work(model, data, tmp_path, monkeypatch):
    found = importlib.util.find_spec

    def without(name, package=None):
        return None if name == "ai_edge_quantizer" else found(name, package)

    # As an environment without it: a second one with torch and without this wheel would be gigabytes.
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(MissingExtra, match="'ai_edge_quantizer'") as caught:
        run(
            model,
            data,
            tmp_path / "a.outrider",
            evaluate=never,
            formats=("onnx", "tflite"),
            recipe=Recipe([Quantize()]),
        )
    assert caught.value.hint == "pip install 'outrider[export]'"
