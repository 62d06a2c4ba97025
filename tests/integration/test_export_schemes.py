"""Every scheme through `export` into one bundle, each variant loaded and run as a device does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from outrider import load
from outrider.bundle import open_bundle
from outrider_exporters import Data, Quantize, Recipe, export
from support.networks import normal, seeded

pytestmark = pytest.mark.slow

SCHEMES = ("int8", "dynamic", "weight-only", "float16", "int4")


class Dense(nn.Module):
    """`x: float32 [N, 64] -> float32 [N, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 256)
        self.second = nn.Linear(256, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def run(output, recipe, **options):
    network, x = seeded(Dense), normal(64, 64, seed=3)
    with torch.no_grad():
        exact = network.eval()(torch.from_numpy(x)).numpy()

    def evaluate(predict, test):
        return {"error": float(np.abs(predict(test)["y"] - exact).max() / np.ptp(exact))}

    return export(
        network,
        example={"x": x[:2]},
        outputs=["y"],
        data=Data(calibration=options.pop("calibration", {"x": x}), test={"x": x}),
        evaluate=evaluate,
        recipe=recipe,
        output=output,
        **options,
    )


def test_every_scheme_becomes_a_variant_of_each_format(tmp_path):
    output = tmp_path / "dense.outrider"
    report = run(output, Recipe([Quantize(scheme) for scheme in SCHEMES]))
    names = [f"{kind}-{scheme}" for kind in ("onnx", "tflite") for scheme in ("float32", *SCHEMES)]
    assert [variant.name for variant in open_bundle(output).manifest.variants] == names
    worst = {"float32": 1e-4, "float16": 1e-3, "weight-only": 0.02, "dynamic": 0.03, "int8": 0.03, "int4": 0.12}
    x = normal(4, 64, seed=3)
    for name in names:
        variant = report.variant(name)
        assert variant.metrics["error"] < worst[name.split("-", 1)[1]]
        with load(output, state=tmp_path / "state", variant=name) as model:
            assert model.variant == name
            assert model.predict({"x": x})["y"].shape == (4, 4)
    sizes = {name: report.variant(name).size_bytes for name in names}
    for kind in ("onnx", "tflite"):
        assert sizes[f"{kind}-int4"] < sizes[f"{kind}-dynamic"] < sizes[f"{kind}-float16"] < sizes[f"{kind}-float32"]


def test_what_needs_no_ranges_needs_no_calibration_rows(tmp_path):
    report = run(tmp_path / "m.outrider", Recipe([Quantize("weight-only")]), calibration=None, formats=("onnx",))
    assert [variant.name for variant in report.variants] == ["onnx-float32", "onnx-weight-only"]
