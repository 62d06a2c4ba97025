"""An existing model file as the source of an export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import outrider
from outrider import cli
from outrider.bundle import open_bundle
from outrider_exporters import Data, MaxDrop, Prune, Quantize, Recipe, export
from outrider_exporters.convert.files import parity
from outrider_exporters.convert.strip import stripped
from outrider_exporters.sources.files import declare
from outrider_runtimes.errors import ConfigError, ExportError, ModelLoadError
from support import tinymodels

pytestmark = pytest.mark.slow

WEIGHTS = tinymodels.weights()
CONTENT = {"onnx": tinymodels.classifier_onnx(WEIGHTS), "tflite": tinymodels.classifier_tflite(WEIGHTS)}
INT8 = Recipe([Quantize("int8")])


def rows(kind: str, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    x = tinymodels.images(count, seed)
    return {"x": x if kind == "onnx" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))}


def data(kind: str) -> Data:
    """The test's answers are the classifier's own, so that its accuracy is 1."""
    right = tinymodels.reference(WEIGHTS, tinymodels.images(128, 1)).argmax(-1)
    return Data(calibration=rows(kind, 64, seed=2), test=(rows(kind, 128), right))


def accuracy(predict, test) -> dict[str, float]:
    return {"accuracy": float((predict(test[0])["y"].argmax(-1) == test[1]).mean())}


def save(folder: Path, kind: str) -> Path:
    path = folder / f"m.{kind}"
    path.write_bytes(CONTENT[kind])
    return path


def run(path: Path, kind: str, **options):
    arguments = {"data": data(kind), "evaluate": accuracy, "output": path.with_name("out.outrider"), **options}
    return export(path, **arguments)


def content(bundle_path: Path, variant: str) -> bytes:
    with open_bundle(bundle_path) as bundle:
        return bundle.read(bundle.manifest.variant(variant).member)


@pytest.mark.parametrize("kind", sorted(CONTENT))
def test_a_file_stays_as_it_is_and_gets_an_int8_sister(tmp_path, kind):
    path = save(tmp_path, kind)
    report = run(path, kind, recipe=INT8, gates=[MaxDrop("accuracy", points=3.0)], labels=list("0123456789"))
    assert [v.name for v in report.variants] == [f"{kind}-float32", f"{kind}-int8"]
    assert report.baseline.metrics == {"accuracy": 1.0}
    assert report.baseline.parameters >= sum(w.size for w in vars(WEIGHTS).values())
    assert report.baseline.macs == (8 * 8 * WEIGHTS.conv.size + WEIGHTS.dense.size if kind == "onnx" else None)
    assert report.variant(f"{kind}-float32").parity == 0.0
    assert content(report.bundle, f"{kind}-float32") == CONTENT[kind] == path.read_bytes()
    with outrider.load(report.bundle, state=tmp_path / "state", variant=f"{kind}-int8") as model:
        spec = model.interface.inputs[0]
        assert (spec.name, spec.shape[0], spec.axes) == ("x", None, "NCHW" if kind == "onnx" else "NHWC")
        given = model.predict(rows(kind, 9))["y"]
    assert parity({"y": tinymodels.reference(WEIGHTS, tinymodels.images(9, 1))}, {"y": given}) < 0.05


def test_a_file_whose_inner_tensors_have_no_names_gets_one_too(tmp_path):
    """As the files of our own bundles are."""
    declared = declare(save(tmp_path, "tflite"), one_is_batch=True)
    light = stripped(declared.file, declared.interface, declared.inputs, tmp_path / "light.tflite")
    assert light.path.name == "light.tflite"
    report = run(light.path, "tflite", recipe=INT8)
    assert [v.name for v in report.variants] == ["tflite-float32", "tflite-int8"]
    assert report.variant("tflite-int8").metrics["accuracy"] > 0.9


def test_a_fixed_row_is_not_n_when_axes_say_so(tmp_path):
    path = save(tmp_path, "tflite")
    one = Data(test=(rows("tflite", 1), np.zeros(1)))
    report = run(path, "tflite", data=one, axes={"x": "", "y": ""}, meanings={"x": "brightness"}, ranges={"x": (0, 1)})
    with open_bundle(report.bundle) as bundle:
        spec = bundle.manifest.interface.inputs[0]
    assert (spec.shape, spec.axes, spec.meaning, spec.range) == ((1, 8, 8, 1), "", "brightness", (0.0, 1.0))


@pytest.mark.parametrize("kind", sorted(CONTENT))
def test_a_quantized_file_is_packed_and_not_quantized_again(tmp_path, kind):
    first = run(save(tmp_path, kind), kind, recipe=INT8)
    quantized = tmp_path / f"q.{kind}"
    quantized.write_bytes(content(first.bundle, f"{kind}-int8"))
    report = run(quantized, kind, output=tmp_path / "q.outrider")
    assert [(v.name, v.precision) for v in report.variants] == [(f"{kind}-int8", "int8")]
    assert content(report.bundle, f"{kind}-int8") == quantized.read_bytes()
    with pytest.raises(ConfigError, match=rf"passes\[0\]: q\.{kind} is int8 already and is not quantized") as caught:
        run(quantized, kind, recipe=INT8, output=tmp_path / "again.outrider")
    assert "leave quantize out" in caught.value.hint
    assert not (tmp_path / "again.outrider").exists()


@pytest.mark.parametrize("kind", sorted(CONTENT))
def test_a_file_of_half_floats_is_packed_as_that(tmp_path, kind):
    first = run(save(tmp_path, kind), kind, recipe=Recipe([Quantize("float16")]))
    half = tmp_path / f"half.{kind}"
    half.write_bytes(content(first.bundle, f"{kind}-float16"))
    report = run(half, kind, output=tmp_path / "half.outrider")
    assert [(v.name, v.precision) for v in report.variants] == [(f"{kind}-float16", "float16")]
    with pytest.raises(ConfigError, match=rf"half\.{kind} is float16 already and is not quantized"):
        run(half, kind, recipe=INT8, output=tmp_path / "again.outrider")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": ("tflite",)}, r"formats is \('tflite',\), but an existing \.onnx file gives onnx variants only"),
        (
            {"recipe": Recipe([Prune(ratio=0.5)])},
            r"passes\[0\]: prune changes a network, and the model is the file m\.o",
        ),
        ({"outputs": ["logits"]}, r"outputs is \['logits'\], m\.onnx has \['y'\]"),
        ({"recipe": INT8, "data": Data(test=(rows("onnx", 8), np.zeros(8)))}, "quantize needs data.calibration"),
    ],
)
def test_what_cannot_be_made_of_a_file_is_refused_at_once(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        run(save(tmp_path, "onnx"), "onnx", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_an_example_must_be_what_the_file_takes(tmp_path):
    with pytest.raises(ExportError, match=r"the example is not what m\.onnx takes: input 'x' is missing"):
        run(save(tmp_path, "onnx"), "onnx", example={"image": tinymodels.images(1)})


def test_a_network_needs_an_example_and_outputs(tmp_path):
    from torch import nn

    for missing, given in (
        ("example", {"outputs": ["y"]}),
        ("outputs", {"example": {"x": np.ones((1, 2), np.float32)}}),
    ):
        with pytest.raises(ConfigError, match=f"{missing} is missing"):
            export(nn.Linear(2, 2), data=data("onnx"), evaluate=accuracy, output=tmp_path / "a.outrider", **given)


def test_a_truncated_file_and_a_file_of_nan(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(CONTENT["tflite"][:500])
    with pytest.raises(ModelLoadError):
        run(path, "tflite")
    path = tmp_path / "nan.onnx"
    path.write_bytes(tinymodels.nan_onnx(WEIGHTS))
    with pytest.raises(ExportError, match="NaN"):
        run(path, "onnx")
    assert not (tmp_path / "out.outrider").exists()


def test_a_missed_gate_ends_the_command_with_1_and_says_which(tmp_path, monkeypatch, capsys):
    save(tmp_path, "onnx")
    (tmp_path / "recipe_of_a_gate.py").write_text(
        "from test_export_file import accuracy, data\n"
        "def rest():\n"
        "    return {'data': data('onnx'), 'evaluate': accuracy}\n"
    )
    (tmp_path / "recipe.toml").write_text(
        'name = "digits"\n[model]\nfile = "m.onnx"\nsource = "recipe_of_a_gate:rest"\n'
        '[[gates]]\ntype = "max_size"\nbytes = 10\n'
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    output = tmp_path / "out.outrider"
    assert cli.main(["export", str(tmp_path / "recipe.toml"), "--output", str(output)]) == 1
    said = capsys.readouterr().err
    assert "error: " in said
    assert "onnx-float32" in said
    assert f"{len(CONTENT['onnx'])} bytes" in said.replace(",", "")
    assert "10 bytes" in said or "at most 10" in said
    assert "hint: no bundle was written" in said
    assert "Traceback" not in said
    assert not output.exists()


def test_a_recipe_file_that_names_a_model_file(tmp_path, monkeypatch, capsys):
    save(tmp_path, "onnx")
    (tmp_path / "recipe_of_a_file.py").write_text(
        "from test_export_file import accuracy, data\n"
        "def rest():\n"
        "    return {'data': data('onnx'), 'evaluate': accuracy}\n"
    )
    (tmp_path / "recipe.toml").write_text(
        'name = "digits"\n[model]\nfile = "m.onnx"\nsource = "recipe_of_a_file:rest"\n'
        '[[passes]]\ntype = "quantize"\nscheme = "int8"\n'
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    output = tmp_path / "out.outrider"
    assert cli.main(["export", str(tmp_path / "recipe.toml"), "--output", str(output), "--json"]) == 0
    names = [variant["name"] for variant in json.loads(capsys.readouterr().out)["variants"]]
    assert names == ["onnx-float32", "onnx-int8"]
