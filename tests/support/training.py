"""What tests of training under quantization share: a fit, a context, and what files of a network answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from outrider_exporters import Data, Quantize
from outrider_exporters.convert import ModelFile, predict_file
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.convert.trained import Trained
from outrider_exporters.passes.base import PassContext
from outrider_exporters.sources.module import PositionalModule, interface_from_module
from support.networks import digits

TRAIN_ROWS = 1200
CONVERTERS = {"onnx": to_onnx, "tflite": to_tflite}
Fit = Callable[[nn.Module, object], None]


class Written(nn.Module):
    """Layers by name, and a function of them and the input as ``forward``."""

    def __init__(self, function: Callable[[nn.ModuleDict, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.function(self.layers, image)


def fitting(epochs: int, rate: float = 1e-3) -> Fit:
    """A fit for class scores with Adam, the same batches each time."""

    def fit(model: nn.Module, train: object) -> None:
        inputs, targets = train
        (array,) = inputs.values()
        x, y = torch.from_numpy(array), torch.from_numpy(targets)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for part in torch.randperm(len(y), generator=generator).split(64):
                loss = functional.cross_entropy(model(x[part]), y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return fit


def digits_context(network: nn.Module, fit: Fit | None) -> tuple[PositionalModule, PassContext]:
    """A copy that learns, and the digits to learn: 1200 rows; the rest is for the test."""
    images, targets = digits()
    example = {"image": images[:100]}
    interface = interface_from_module(network, example, ["logits"])
    data = Data(
        train=({"image": images[:TRAIN_ROWS]}, targets[:TRAIN_ROWS]),
        calibration=example,
        test=({"image": images[TRAIN_ROWS:]}, targets[TRAIN_ROWS:]),
    )
    copied = PositionalModule(network, ["image"], ["logits"]).requires_grad_(True)
    return copied, PassContext(interface=interface, example=example, data=data, fit=fit)


def float_file(kind: str, network: nn.Module, work: PassContext, folder: Path) -> ModelFile:
    return CONVERTERS[kind](network, work.interface, work.example, folder / f"plain.{kind}")


def int8_file(
    plain: ModelFile, work: PassContext, folder: Path, rule: Quantize, trained: Trained | None = None
) -> ModelFile:
    """The static int8 file of a float file; calibrated anew where nothing was trained."""
    path = folder / f"int8.{plain.format}"
    return quantize_file(plain, [work.data.calibration], work.interface, path, rule=rule, trained=trained)


def accuracy(file: ModelFile, work: PassContext) -> float:
    inputs, targets = work.data.test
    (answers,) = predict_file(file, work.interface)(inputs).values()
    return float(np.mean(answers.argmax(-1) == targets))
