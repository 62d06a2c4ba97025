"""Free lengths and recurrent state, from a torch network through a bundle to both engines and an endpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import outrider
from outrider import cli
from outrider.bundle import open_bundle
from outrider_exporters import Data, Quantize, Recipe, export
from outrider_runtimes.errors import ConfigError, ExportError, NotFiniteError, ShapeError
from support.hybrids import EndpointProcess
from support.variable import Cells

pytestmark = pytest.mark.slow

STATE = {"h": "h_next", "c": "c_next"}
ZEROS = np.zeros((1, 1, 8), np.float32)
STEPS = 12


def rows(count, length=3, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {"x": draw(count, length, 4), "h": draw(count, 1, 8), "c": draw(count, 1, 8)}


def run(output, **options):
    arguments = {
        "example": {**rows(1), "h": ZEROS, "c": ZEROS},
        "outputs": ["scores", "h_next", "c_next"],
        "data": Data(test=rows(32, seed=1)),
        "evaluate": lambda predict, test: {"mean": float(predict(test)["scores"].mean())},
        "axes": {"x": "NTC"},
        "dynamic_axes": {"x": "T"},
        "state": STATE,
        "output": output,
        **options,
    }
    return export(Cells().eval(), **arguments)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    report = run(folder / "cells.outrider", shapes={"T": [1, 3]}, recipe=Recipe([Quantize("weight-only")]))
    return report, folder / "state"


@pytest.fixture(scope="module")
def sequence():
    """x: [2, STEPS, 4], and the scores of one run over all of it."""
    x = np.random.default_rng(5).standard_normal((2, STEPS, 4)).astype(np.float32)
    zeros = torch.zeros(2, 1, 8)
    with torch.inference_mode():
        return x, Cells().eval()(torch.from_numpy(x), zeros, zeros)[0].numpy()


def test_the_bundle_says_what_is_free_and_what_is_state(exported):
    report, _ = exported
    assert [variant.name for variant in report.variants] == [
        f"{kind}-{precision}" for kind in ("onnx", "tflite") for precision in ("float32", "weight-only")
    ]
    assert all(variant.parity <= 1e-4 for variant in report.variants if variant.precision == "float32")
    with open_bundle(report.bundle) as bundle:
        manifest = bundle.manifest
    assert manifest.requires == ("signatures",)
    assert [spec.shape for spec in manifest.interface.inputs] == [(None, None, 4), (None, 1, 8), (None, 1, 8)]
    assert {pair.input: pair.output for pair in manifest.interface.state} == STATE
    for variant in manifest.variants:
        lengths = [item["x"][1] for item in variant.binding.signatures]
        assert lengths == ([] if variant.format == "onnx" else [1, 3])
    asked = report.to_dict()["asked"]
    assert asked["dynamic_axes"] == {"x": "T"} and asked["shapes"] == {"T": [1, 3]} and asked["state"] == STATE


def test_inspect_tells_of_both(exported, capsys):
    report, _ = exported
    assert cli.main(["inspect", str(report.bundle), "--json"]) == 0
    told = {variant["name"]: variant["shapes"] for variant in json.loads(capsys.readouterr().out)["variants"]}
    assert told["onnx-float32"] == []
    assert [shape["x"] for shape in told["tflite-float32"]] == [[1, 1, 4], [1, 3, 4]]
    assert cli.main(["inspect", str(report.bundle)]) == 0
    text = capsys.readouterr().out
    assert "h_next -> h" in text and "2 shapes" in text and "[N, T, 4]" in text


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("variant", ["onnx-float32", "tflite-float32"])
def test_step_by_step_is_the_whole_sequence(exported, sequence, variant, length):
    report, state = exported
    x, wanted = sequence
    with outrider.load(report.bundle, state=state, variant=variant) as model:
        stream = model.stream()
        for _ in range(2):
            given = [stream.infer({"x": x[:, at : at + length]}).outputs for at in range(0, STEPS, length)]
            assert set(given[0]) == {"scores"}
            np.testing.assert_allclose(np.concatenate([g["scores"] for g in given], 1), wanted, atol=1e-5)
            stream.reset()


@pytest.mark.parametrize("variant", ["onnx-weight-only", "tflite-weight-only"])
def test_smaller_variants_hold_their_state_too(exported, sequence, variant):
    report, state = exported
    x, wanted = sequence
    with outrider.load(report.bundle, state=state, variant=variant) as model:
        stream = model.stream()
        given = [stream.infer(x[:, at : at + 1]).outputs["scores"] for at in range(STEPS)]
    np.testing.assert_allclose(np.concatenate(given, 1), wanted, atol=0.05)


@pytest.mark.parametrize("variant", ["onnx-float32", "tflite-float32"])
def test_a_failed_step_is_as_if_it_had_not_been(exported, sequence, variant):
    report, state = exported
    x, wanted = sequence
    given = []
    with outrider.load(report.bundle, state=state, variant=variant) as model:
        stream = model.stream()
        for at in range(STEPS):
            with pytest.raises(NotFiniteError):
                stream.infer({"x": np.full((2, 1, 4), np.nan, np.float32)})
            with pytest.raises(ShapeError, match="N = 3|'x' has shape" if at else "'x' has shape"):
                stream.infer({"x": np.zeros((3 if at else 2, 1, 4 if at else 5), np.float32)})
            given.append(stream.infer({"x": x[:, at : at + 1]}).outputs["scores"])
    np.testing.assert_allclose(np.concatenate(given, 1), wanted, atol=1e-5)


def test_lengths_that_a_variant_has_not(exported):
    report, state = exported
    with outrider.load(report.bundle, state=state, variant="onnx-float32") as model:
        assert model.predict(rows(2, 7))["scores"].shape == (2, 7, 3)
    with outrider.load(report.bundle, state=state, variant="tflite-float32") as model:
        with pytest.raises(ShapeError, match=r"'x' \[N, 7, 4\]") as caught:
            model.infer(rows(2, 7), deadline_ms=60_000.0)
        assert "'x' [N, 1, 4]; 'x' [N, 3, 4]" in caught.value.hint
        assert model.predict(rows(2, 3))["scores"].shape == (2, 3, 3)


def test_the_state_goes_on_in_the_cloud(sequence, tmp_path):
    """The edge is closed in mid-sequence; the endpoint serves the same bundle, of one variant: the choice among several
    is by their speed."""
    report, state = run(tmp_path / "cells.outrider", formats=("onnx",)), tmp_path / "state"
    x, wanted = sequence
    endpoint = EndpointProcess(report.bundle, model="cells", state=tmp_path / "endpoint")
    try:
        endpoint.start()
        edge = outrider.load(report.bundle, state=state, variant="onnx-float32")
        policy = outrider.Policy(deadline_ms=60_000.0)
        with outrider.Remote(endpoint.url, model="cells") as cloud, outrider.Hybrid(edge, cloud, policy) as hybrid:
            stream, given, sources = hybrid.stream(), [], []
            for at in range(STEPS):
                if at == STEPS // 2:
                    edge.close()
                prediction = stream.infer({"x": x[:, at : at + 1]})
                given.append(prediction.outputs["scores"])
                sources.append(prediction.source)
    finally:
        endpoint.stop()
    assert sources == ["edge"] * (STEPS // 2) + ["cloud"] * (STEPS // 2)
    np.testing.assert_allclose(np.concatenate(given, 1), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "a TFLite file has fixed sizes", {}),
        (ConfigError, "shapes is given, and formats is", {"shapes": {"T": [3]}, "formats": ("onnx",)}),
        (ConfigError, "the data has T = 3", {"shapes": {"T": [1, 4]}}),
        (ConfigError, "'S' is no free axis", {"shapes": {"S": [1, 4]}}),
        (ExportError, "no 'S'", {"dynamic_axes": {"x": "S"}}),
        (ExportError, "must be alike", {"state": {"h": "scores"}, "formats": ("onnx",)}),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, error, words, options):
    with pytest.raises(error, match=words):
        run(tmp_path / "no.outrider", **options)
    assert not list(tmp_path.iterdir())


RECIPE = """
formats = ["onnx"]

[model]
source = "cells_source:build"

[dynamic_axes]
x = "T"

[state]
h = "h_next"
c = "c_next"
"""
SOURCE = """
import numpy as np
from outrider_exporters import Data
from support.variable import Cells

def build():
    zeros = np.zeros((1, 1, 8), np.float32)
    rows = {"x": np.ones((1, 3, 4), np.float32), "h": zeros, "c": zeros}
    return {
        "model": Cells().eval(),
        "example": rows,
        "outputs": ["scores", "h_next", "c_next"],
        "axes": {"x": "NTC"},
        "data": Data(test=rows),
        "evaluate": lambda predict, test: {"mean": float(predict(test)["scores"].mean())},
    }
"""


def test_a_recipe_file_knows_free_axes_and_state(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "cells_source.py").write_text(SOURCE)
    output = tmp_path / "cells.outrider"
    assert cli.main(["export", str(tmp_path / "recipe.toml"), "--output", str(output), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    with open_bundle(output) as bundle:
        interface = bundle.manifest.interface
        assert bundle.manifest.requires == ()
    assert interface.inputs[0].shape == (None, None, 4)
    assert {pair.input: pair.output for pair in interface.state} == STATE
