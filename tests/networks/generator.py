"""Item 10: an image generator with transposed convolutions and batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from networks.case import JUDGED, R2, Case, Outputs, Predict, Trained, fit, in_chunks
from networks.images import digits
from outrider_exporters import Data

CODE = 16


def generator() -> nn.Module:
    """code: float32 [N, 16] -> image: float32 [N, 1, 28, 28] in 0..1."""
    return nn.Sequential(
        nn.Linear(CODE, 16 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (16, 7, 7)),
        nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def train_generator(held_out: int = JUDGED) -> Trained:
    """A code is an image's first 16 principal components: the best straight line back is the baseline."""
    torch.manual_seed(0)
    split = digits(train=2000, test=1000, noise=0.0, held_out=held_out)
    images, labels = split.train
    flat = images.reshape(len(images), -1)
    mean = flat.mean(0)
    _, spread, axes = np.linalg.svd(flat - mean, full_matrices=False)
    scale = spread[:CODE] / np.sqrt(len(flat))

    def encode(pictures: np.ndarray) -> np.ndarray:
        return ((pictures.reshape(len(pictures), -1) - mean) @ axes[:CODE].T / scale).astype(np.float32)

    network = fit(generator(), encode(images), images, loss=functional.mse_loss, epochs=6, rate=8e-3, rows=32)
    codes, wanted = encode(split.test[0]), split.test[0]
    means = np.stack([flat[labels == digit].mean(0) for digit in range(10)])
    return Trained(
        module=network,
        example={"code": codes[:2]},
        outputs=("image",),
        data=Data(calibration={"code": encode(split.calibration)}, test=({"code": codes}, wanted)),
        evaluate=_r2,
        baseline=_explained((codes * scale) @ axes[:CODE] + mean, wanted, mean),
        decide=lambda outputs, _: _nearest(outputs["image"], means),
    )


def _explained(images: np.ndarray, wanted: np.ndarray, mean: np.ndarray) -> float:
    flat = wanted.reshape(len(wanted), -1)
    return 1.0 - float(((images.reshape(flat.shape) - flat) ** 2).sum() / ((flat - mean) ** 2).sum())


def _nearest(images: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The digit that an image is nearest to."""
    return ((means**2).sum(1) - 2.0 * images.reshape(len(images), -1) @ means.T).argmin(1)


def _r2(predict: Predict, test: Any) -> dict[str, float]:
    inputs, wanted = test
    outputs: Outputs = in_chunks(predict, inputs)
    return {"r2": _explained(outputs["image"], wanted, wanted.reshape(len(wanted), -1).mean(0))}


CASES = (
    Case(
        name="generator",
        item=10,
        network="dense 784, two transposed convolutions 4x4 with batch norm, conv 3x3, sigmoid: 16 -> 1x28x28",
        data="scikit-learn's digits drawn at 28x28, from their first 16 principal components",
        parameters=19_593,
        metric=R2,
        rule="the components' linear reconstruction",
        baseline=0.779,
        floor=0.82,
        ceiling=0.95,
        forms={"onnx": "weight-only", "tflite": "int8"},
        train=train_generator,
    ),
)
