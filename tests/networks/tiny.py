"""Item 11: the four reference shapes of MLPerf Tiny, on data out of seeded generators."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from networks.case import ACCURACY, JUDGED, Case, Metric, Outputs, Predict, Trained, classifier, fit, in_chunks
from networks.images import shapes
from networks.sounds import machine, words
from outrider_exporters import Data

AUC = Metric(name="auc")
WORDS = partial(words, train=2000, test=4000, noise=0.35)
SMALL_SHAPES = partial(shapes, size=32, train=1500, test=4000, noise=0.06)
TWO_SHAPES = partial(shapes, size=96, train=1000, test=4000, noise=0.05, classes=("cross", "disc"), radius=(0.3, 0.45))


def normed(before: int, after: int, size: Any, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(before, after, size, bias=False, **options), nn.BatchNorm2d(after), nn.ReLU()]


def separable(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    depthwise = normed(before, before, 3, stride=stride, padding=1, groups=before)
    return [*depthwise, *normed(before, after, 1)]


def ds_cnn() -> nn.Module:
    """features: float32 [N, 1, 49, 10] -> scores: float32 [N, 12]."""
    blocks = [layer for _ in range(4) for layer in separable(64, 64)]
    first = normed(1, 64, (10, 4), stride=2, padding=(5, 1))
    return nn.Sequential(
        *first, nn.Dropout(0.2), *blocks, nn.Dropout(0.4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12)
    )


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *normed(before, after, 3, stride=stride, padding=1),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet8() -> nn.Module:
    """image: float32 [N, 3, 32, 32] -> scores: float32 [N, 10]."""
    return nn.Sequential(
        *normed(3, 16, 3, padding=1), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def mobilenet() -> nn.Module:
    """image: float32 [N, 3, 96, 96] -> scores: float32 [N, 2]. MobileNetV1 of width 0.25."""
    widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    blocks = [
        layer
        for before, after, stride in zip(widths, widths[1:], strides, strict=False)
        for layer in separable(before, after, stride)
    ]
    return nn.Sequential(
        *normed(3, 8, 3, stride=2, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 2)
    )


def autoencoder() -> nn.Module:
    """spectrum: float32 [N, 640] -> spectrum: float32 [N, 640]."""
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def train_ds_cnn(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = WORDS(held_out=held_out)
    network = fit(ds_cnn(), *split.train, epochs=5, rate=6e-3)
    return classifier(network, split.train, split.calibration, split.test, name="features")


def train_resnet8(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = SMALL_SHAPES(held_out=held_out)
    network = fit(resnet8(), *split.train, epochs=4, rate=6e-3)
    return classifier(network, split.train, split.calibration, split.test, name="image")


def train_mobilenet(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = TWO_SHAPES(held_out=held_out)
    images, labels = split.train
    network = fit(mobilenet(), images[:, :, ::2, ::2], labels, epochs=6, rate=6e-3, rows=32)  # a quarter of the work
    network = fit(network, images, labels, epochs=1, rate=3e-3, rows=32)
    return classifier(network, split.train, split.calibration, split.test, name="image")


def train_autoencoder(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    split = machine(train=3000, test=2000, held_out=held_out)
    normal = split.train[0]
    network = fit(autoencoder(), normal, normal, loss=functional.mse_loss, epochs=10, rate=5e-3)
    spectra, broken = split.test
    with torch.inference_mode():
        usual = network(torch.from_numpy(split.calibration)).numpy()
    limit = float(np.quantile(_errors(usual, split.calibration), 0.9))
    return Trained(
        module=network,
        example={"spectrum": spectra[:2]},
        outputs=("rebuilt",),
        data=Data(calibration={"spectrum": split.calibration}, test=({"spectrum": spectra}, broken)),
        evaluate=_auc_of_errors,
        baseline=_auc(_errors(normal.mean(0), spectra), broken),
        decide=lambda outputs, inputs: _errors(outputs["rebuilt"], inputs["spectrum"]) > limit,
    )


def _errors(rebuilt: np.ndarray, spectra: np.ndarray) -> np.ndarray:
    return ((rebuilt - spectra) ** 2).mean(1)


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a broken machine scores above a sound one."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _auc_of_errors(predict: Predict, test: Any) -> dict[str, float]:
    inputs, broken = test
    outputs: Outputs = in_chunks(predict, inputs)
    return {"auc": _auc(_errors(outputs["rebuilt"], inputs["spectrum"]), broken)}


STATIC = {"onnx": "int8", "tflite": "int8"}
CASES = (
    Case(
        name="ds-cnn",
        item=11,
        network="MLPerf Tiny's DS-CNN on 49x10x1: conv 10x4, four depthwise separable blocks of 64, dense 12",
        data="twelve words of three tones each in noise, as the logarithm of 10 bands",
        parameters=23_180,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.56,
        floor=0.70,
        ceiling=0.98,
        forms=STATIC,
        train=train_ds_cnn,
    ),
    Case(
        name="resnet8",
        item=11,
        network="MLPerf Tiny's ResNet-8 on 32x32x3: three residual blocks of 16, 32, 64, dense 10",
        data="ten shapes of any colour on slanting backgrounds, turned, noise 0.06",
        parameters=77_946,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.11,
        floor=0.80,
        ceiling=0.99,
        forms=STATIC,
        train=train_resnet8,
    ),
    Case(
        name="mobilenet",
        item=11,
        network="MLPerf Tiny's MobileNetV1 0.25 on 96x96x3, dense 2",
        data="a cross or a disc of any colour on slanting backgrounds, noise 0.05",
        parameters=213_586,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.49,
        floor=0.75,
        ceiling=0.99,
        forms=STATIC,
        train=train_mobilenet,
    ),
    Case(
        name="autoencoder",
        item=11,
        network="MLPerf Tiny's autoencoder of 640: dense 128 four times, 8, 128 four times, 640, batch norm",
        data="five frames of 128 bands of a running machine; broken ones have a harmonic that does not belong",
        parameters=267_928,
        metric=AUC,
        rule="distance from the mean of the training rows",
        baseline=0.62,
        floor=0.80,
        ceiling=0.99,
        forms=STATIC,
        train=train_autoencoder,
    ),
)
