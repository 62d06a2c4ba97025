"""Item 1 and 2: the two plain convolutional networks, on digits of 28x28."""

from __future__ import annotations

import torch
from torch import nn

from networks.case import ACCURACY, JUDGED, Case, Trained, classifier, fit
from networks.images import digits


def lenet() -> nn.Module:
    """image: float32 [N, 1, 28, 28] -> scores: float32 [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def wide() -> nn.Module:
    """image: float32 [N, 1, 28, 28] -> scores: float32 [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 10),
    )  # fmt: skip


def train_lenet(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = digits(train=4000, test=2000, noise=0.25, held_out=held_out)
    return classifier(
        fit(lenet(), *split.train, epochs=5, rate=4e-3), split.train, split.calibration, split.test, name="image"
    )


def train_wide(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = digits(train=4000, test=2000, noise=0.25, held_out=held_out)
    return classifier(
        fit(wide(), *split.train, epochs=3, rate=4e-3), split.train, split.calibration, split.test, name="image"
    )


CASES = (
    Case(
        name="lenet",
        item=1,
        network="conv 5x5 6, pool, conv 16, pool, dense 120-84-10 on 1x28x28",
        data="scikit-learn's digits drawn at 28x28, turned, scaled, moved, noise 0.25",
        parameters=61_706,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.67,
        floor=0.90,
        ceiling=0.99,
        forms={"onnx": "int8", "tflite": "int8"},
        train=train_lenet,
    ),
    Case(
        name="cnn",
        item=2,
        network="conv 32, pool, conv 64, pool, dense 10 on 1x28x28",
        data="as lenet",
        parameters=34_826,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.67,
        floor=0.85,
        ceiling=0.99,
        forms={"onnx": "int8", "tflite": "int8"},
        train=train_wide,
    ),
)
