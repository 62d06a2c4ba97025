"""Steps around a network, from export to the board: a caller passes pictures and gets probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import outrider
from outrider import cli
from outrider.bundle import open_bundle
from outrider_exporters import Data, MaxDrop, Prune, Quantize, Recipe, export
from outrider_runtimes.errors import ConfigError, DtypeError, ExportError
from outrider_runtimes.processing import Layout, Normalise, Softmax

pytestmark = pytest.mark.slow

BEFORE = [Normalise(tensor="image", mean=[0.5], std=[0.5], divided_by=255.0), Layout(tensor="image", to="NCHW")]
AFTER = [Softmax(tensor="logits")]
EXPORT = {"outputs": ["logits"], "preprocessing": BEFORE, "postprocessing": AFTER, "axes": {"image": "NHWC"}}


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8, 1] in 0..255, and classes int64 [1797], in a seeded order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order, ..., None] / 16 * 255).astype(np.uint8), digits.target[order]


def inside(images: np.ndarray) -> torch.Tensor:
    """What the steps do, in torch: float32 [N, 1, 8, 8] in -1..1."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - 0.5) / 0.5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10)
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        for at in range(0, len(y), 100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at : at + 100]), y[at : at + 100]).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    images, classes = pictures()
    model = network()
    train(model, inside(images[:900]), torch.from_numpy(classes[:900]), 4)
    seen = {"fit": [], "predict": []}

    def fit(network, part):
        seen["fit"].append({name: (array.dtype.name, array.shape) for name, array in part[0].items()})
        train(network, torch.from_numpy(part[0]["image"]), torch.from_numpy(part[1]), 1)

    def evaluate(predict, test):
        outputs = predict(test[0])
        seen["predict"].append(outputs)
        return {"accuracy": float((outputs["logits"].argmax(1) == test[1]).mean())}

    report = export(
        model,
        example={"image": images[:1]},
        data=Data(
            train=({"image": images[:900]}, classes[:900]),
            calibration={"image": images[900:1000]},
            test=({"image": images[1000:]}, classes[1000:]),
        ),
        fit=fit,
        evaluate=evaluate,
        recipe=Recipe([Prune(ratio=0.25), Quantize("int8")]),
        gates=[MaxDrop("accuracy", points=5.0)],
        meanings={"image": "a digit, white on black", "logits": "probabilities"},
        output=tmp_path_factory.mktemp("steps") / "digits.outrider",
        **EXPORT,
    )
    return report, seen


def test_the_bundle_says_what_a_caller_passes_and_what_the_network_takes(exported):
    report, _ = exported
    with open_bundle(report.bundle) as bundle:
        manifest = bundle.manifest
    interface = manifest.interface
    image, logits = interface.inputs[0], interface.outputs[0]
    assert (image.dtype, image.shape, image.axes) == ("uint8", (None, 8, 8, 1), "NHWC")
    assert image.meaning == "a digit, white on black"
    assert logits.meaning == "probabilities"
    inner = interface.network.inputs[0]
    assert (inner.dtype, inner.shape, inner.axes) == ("float32", (None, 1, 8, 8), "NCHW")
    assert interface.processing.before == tuple(BEFORE)
    assert interface.processing.after == tuple(AFTER)
    assert manifest.requires == ("steps",)
    assert manifest.golden.inputs["image"].dtype == "uint8"


def test_evaluate_sees_the_callers_side_and_fit_the_networks(exported):
    report, seen = exported
    assert seen["fit"] == [{"image": ("float32", (900, 1, 8, 8))}]
    for outputs in seen["predict"]:
        assert np.allclose(outputs["logits"].sum(1), 1.0, atol=1e-5)
    assert all(variant.metrics["accuracy"] > 0.85 for variant in report.variants)
    assert len(report.variants) == 4


@pytest.mark.parametrize("variant", ["onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8"])
def test_the_board_runs_the_same_steps(exported, tmp_path, variant):
    report, _ = exported
    images, classes = pictures()
    with outrider.load(report.bundle, state=tmp_path, variant=variant) as model:
        answer = model.infer(images[1000:1200])
        alone = model.infer(images[1000:1001])
        with pytest.raises(DtypeError, match="uint8"):
            model.infer(images[:1].astype(np.float32))
        again = model.infer(images[1000:1200])
    probabilities = answer.outputs["logits"]
    assert np.allclose(probabilities.sum(1), 1.0, atol=1e-5)
    assert np.allclose(alone.outputs["logits"], probabilities[:1], atol=1e-5)
    assert np.array_equal(again.outputs["logits"], probabilities)
    assert (probabilities.argmax(1) == classes[1000:1200]).mean() > 0.85
    assert answer.timing_ms.pre > 0.0
    assert answer.timing_ms.post > 0.0


def test_inspect_shows_the_way_through_the_network(exported, capsys):
    report, _ = exported
    assert cli.main(["inspect", str(report.bundle)]) == 0
    assert (
        "normalise, layout -> image: float32 [N, 1, 8, 8] => logits: float32 [N, 10] -> softmax"
        in capsys.readouterr().out
    )
    assert cli.main(["inspect", str(report.bundle), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["interface"]
    assert [step["step"] for step in shown["preprocessing"]] == ["normalise", "layout"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"preprocessing": [Layout(tensor="picture", to="NCHW")]}, ConfigError, r"preprocessing: step 0 \(layout\)"),
        ({"preprocessing": [BEFORE[0]]}, ExportError, "failed on inputs of float32"),
        ({"postprocessing": [Softmax(tensor="scores")]}, ConfigError, r"steps around the network: step 0 \(softmax\)"),
        ({"meanings": {"picture": "?"}}, ConfigError, "meanings: there is no tensor 'picture'"),
        ({"example": None}, ConfigError, "example is missing: steps start from what a caller passes"),
    ],
)
def test_steps_that_do_not_fit_are_refused_before_any_work(tmp_path, changes, kind, message):
    images, classes = pictures()
    arguments = {
        "example": {"image": images[:1]},
        "data": Data(test=({"image": images[:9]}, classes[:9])),
        "evaluate": lambda predict, test: {"accuracy": 1.0},
        "output": tmp_path / "a.outrider",
        **EXPORT,
        **changes,
    }
    with pytest.raises(kind, match=message):
        export(network(), **arguments)
    assert not list(tmp_path.iterdir())
