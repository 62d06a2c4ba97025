"""An export whose int8 variants miss the gate as a whole, and meet it with the layers in float that lose most."""

from __future__ import annotations

import numpy as np
import pytest

from outrider import load
from outrider_exporters import Data, MaxDrop, MinMetric, Quantize, Recipe, export
from outrider_runtimes.errors import GateMissed
from support.networks import digits
from support.outlier import TRAIN_ROWS, planted, trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network():
    return planted(trained())


def accuracy(predict, test) -> dict[str, float]:
    inputs, targets = test
    return {"accuracy": float((predict(inputs)["logits"].argmax(-1) == targets).mean())}


def run(network, output, *gates, formats=("onnx", "tflite"), **options):
    images, targets = digits()
    return export(
        network,
        example={"image": images[:2]},
        outputs=["logits"],
        data=Data(calibration={"image": images[:100]}, test=({"image": images[TRAIN_ROWS:]}, targets[TRAIN_ROWS:])),
        evaluate=accuracy,
        recipe=Recipe([Quantize("int8")]),
        formats=formats,
        gates=gates,
        output=output,
        **options,
    )


def test_a_variant_that_misses_its_gate_is_rescued_and_says_how(network, tmp_path):
    steps = []
    report = run(
        network, tmp_path / "m.outrider", MaxDrop("accuracy", points=1.0), progress=lambda item: steps.append(item.step)
    )
    assert "rescue" in steps
    for name in ("onnx-int8", "tflite-int8"):
        variant = report.variant(name)
        assert variant.scheme.endswith("-mixed")
        assert "kept in float" in variant.note
        assert "first (" in variant.note and "second (" in variant.note
        assert "stem" not in variant.note and "head" not in variant.note
        assert variant.metrics["accuracy"] >= report.baseline.metrics["accuracy"] - 0.01
        assert variant.size_bytes < report.variant(name.replace("int8", "float32")).size_bytes
    assert all(result.passed for result in report.gates)
    images, targets = digits()
    with load(tmp_path / "m.outrider", state=tmp_path / "state", variant="onnx-int8") as model:
        given = model.predict({"image": images[TRAIN_ROWS:]})["logits"]
    assert np.mean(given.argmax(-1) == targets[TRAIN_ROWS:]) >= report.baseline.metrics["accuracy"] - 0.01


def test_a_gate_that_float_misses_too_is_no_matter_of_int8(network, tmp_path):
    steps = []
    with pytest.raises(GateMissed, match="onnx-float32 missed min_metric"):
        run(
            network,
            tmp_path / "m.outrider",
            MinMetric("accuracy", at_least=0.999),
            formats=("onnx",),
            progress=lambda item: steps.append(item.step),
        )
    assert "rescue" not in steps
    assert list(tmp_path.iterdir()) == []
