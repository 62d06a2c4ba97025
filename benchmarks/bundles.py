"""The bundles that the benchmarks run, exported and installed in a folder of the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import outrider
from outrider_exporters import Data, Quantize, Recipe, export
from outrider_runtimes.tensors import Array

CALIBRATION_ROWS = 64
TEST_ROWS = 64


def export_noise(module: nn.Module, shape: tuple[int, ...], *, name: str, folder: Path) -> Path:
    """Export to float32 and int8 in both formats; calibrated and compared on uniform noise.

    Args:
        shape: of one input image, without N.
    """
    rng = np.random.default_rng(0)
    calibration, test = (rng.random((rows, *shape), np.float32) for rows in (CALIBRATION_ROWS, TEST_ROWS))
    with torch.no_grad():
        wanted = module(torch.from_numpy(test)).argmax(1).numpy()

    def agreement(predict: Any, images: Array) -> dict[str, float]:
        return {"agreement": float(np.mean(predict({"image": images})["logits"].argmax(1) == wanted))}

    output = folder / f"{name}.outrider"
    export(
        module,
        example={"image": calibration[:1]},
        outputs=["logits"],
        data=Data(train=({"image": calibration}, np.zeros(CALIBRATION_ROWS, np.int64)),
                  calibration={"image": calibration}, test=test),
        evaluate=agreement,
        recipe=Recipe([Quantize("int8")]),
        formats=("onnx", "tflite"),
        gates=[],
        output=output,
        name=name,
    )  # fmt: skip
    return output


def load_variant(bundle: Path, variant: str, *, folder: Path) -> outrider.Model:
    """One variant of a bundle, on one thread."""
    return outrider.load(bundle, variant=variant, threads=1, state=folder / "state")
