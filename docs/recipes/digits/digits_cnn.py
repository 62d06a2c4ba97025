"""The model of the recipe beside this file: scikit-learn's handwritten digits, 8x8 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from outrider_exporters import Data


def network(width: int) -> nn.Module:
    """image: float32 [N, 1, 8, 8] in 0..1 -> logits: float32 [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fit(model: nn.Module, train: Any) -> None:
    """Fifteen epochs of Adam on cross-entropy, in place."""
    images, targets = torch.from_numpy(train[0]["image"]), torch.from_numpy(train[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(15):
        for rows in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), targets[rows]).backward()
            optimizer.step()


def accuracy(predict: Any, test: Any) -> dict[str, float]:
    """The share of right classes; the same function judges torch, ONNX Runtime and LiteRT."""
    inputs, targets = test
    return {"accuracy": float((predict(inputs)["logits"].argmax(-1) == targets).mean())}


def data() -> Data:
    """1,000 images to train, 300 to calibrate, 497 to test; no image is in two parts."""
    raw = load_digits()
    images = (raw.images / 16.0).astype(np.float32)[:, np.newaxis]
    train, calibration, test = np.split(np.random.default_rng(0).permutation(len(images)), [1000, 1300])
    return Data(
        train=({"image": images[train]}, raw.target[train].astype(np.int64)),
        calibration={"image": images[calibration]},
        test=({"image": images[test]}, raw.target[test]),
    )


def build() -> dict[str, Any]:
    """What ``model.source`` names: the arguments of ``outrider_exporters.export`` that a recipe file cannot hold."""
    torch.manual_seed(0)
    parts = data()
    small, teacher = network(16), network(48)
    fit(small, parts.train)
    fit(teacher, parts.train)
    return {
        "model": small,
        "example": {"image": parts.test[0]["image"][:1]},
        "outputs": ["logits"],
        "data": parts,
        "fit": fit,
        "teacher": teacher,
        "evaluate": accuracy,
    }
