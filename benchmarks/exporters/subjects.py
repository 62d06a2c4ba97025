"""The networks that are exported: two of the usual size with settled noise for weights, three small ones, trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.networks import mobilenet_v2, resnet18, seeded, settled
from networks import tiny
from networks.case import Predict, Trained, accuracy, fit
from networks.images import Split
from outrider_exporters import Data
from outrider_runtimes.tensors import Array

INPUT, OUTPUT = "image", "scores"
NOISE_ROWS = 32
LARGE = (3, 224, 224)
RATE = 2e-3  # the highest of a cycle; the table's training ended well below
HELD_OUT_SEED = 1  # the generators' seed 0 drew what was trained on


@dataclass(frozen=True, kw_only=True)
class Material:
    """A network and its rows.

    Attributes:
        data: ``calibration`` and ``train`` by input name; ``test`` is ``({"image": rows}, classes)``.
    """

    module: nn.Module
    data: Data

    @property
    def calibration(self) -> Array:
        """float32 [N, C, H, W]."""
        assert self.data.calibration is not None
        return self.data.calibration[INPUT]

    @property
    def test(self) -> tuple[Array, Array]:
        """float32 [N, C, H, W] and int64 [N]."""
        inputs, classes = self.data.test
        return inputs[INPUT], classes


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How much is pruned of a trained network, and for how many epochs it is trained on, pruned or not."""

    ratio: float
    epochs: int

    def fit(self, module: nn.Module, train: Any) -> None:
        """As ``export`` calls it."""
        inputs, classes = train
        fit(module, inputs[INPUT], classes, epochs=self.epochs, rate=RATE)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One network.

    Attributes:
        name: of its folder and its rows in the results.
        text: what it is, in words.
        speedup: the best int8 file is to be so many times as fast as the best float32 file; 0 where nothing was asked.
        tuning: of one that is pruned too. Only these are trained: the others' classes are their own answers in PyTorch.
        blocks, calls_a_block: of the timing, by how long one call takes.
        make: builds it, the same each time.
    """

    name: str
    text: str
    make: Callable[[], Material]
    speedup: float = 0.0
    tuning: Tuning | None = None
    blocks: int = 40
    calls_a_block: int = 50


def evaluate(predict: Predict, test: Any) -> dict[str, float]:
    """The accuracy on ``Material.data.test``."""
    return accuracy(predict, test)


def _noise(build: Callable[[], nn.Module]) -> Material:
    module = settled(seeded(build), LARGE)
    rng = np.random.default_rng(0)
    calibration, test = (rng.random((NOISE_ROWS, *LARGE), np.float32) for _ in range(2))
    with torch.inference_mode():
        classes = module(torch.from_numpy(test)).argmax(1).numpy()
    return Material(module=module, data=Data(calibration={INPUT: calibration}, test=({INPUT: test}, classes)))


def _trained(train: Callable[[], Trained], rows: Callable[..., Split], *, epochs: int, held_out: int) -> Material:
    """A network of the tests' table, trained on for some epochs: the table wants room below the ceiling, and here few
    answers should hang by a hair. Its test rows are new ones."""
    module, split = train().module, rows()
    fit(module, *split.train, epochs=epochs, rate=RATE)
    images, classes = rows(train=1, test=held_out, seed=HELD_OUT_SEED).test
    return Material(
        module=module,
        data=Data(
            train=({INPUT: split.train[0]}, split.train[1]),
            calibration={INPUT: split.calibration},
            test=({INPUT: images}, classes),
        ),
    )


SUBJECTS = (
    Subject(
        name="resnet18",
        text="ResNet-18, 224x224x3, seeded weights",
        make=lambda: _noise(resnet18),
        speedup=2.8,
        blocks=20,
        calls_a_block=5,
    ),
    Subject(
        name="mobilenet-v2",
        text="MobileNetV2, 224x224x3, seeded weights",
        make=lambda: _noise(mobilenet_v2),
        speedup=1.8,
        blocks=30,
        calls_a_block=10,
    ),
    Subject(
        name="resnet8",
        text="ResNet-8 (MLPerf Tiny), 32x32x3, trained",
        make=lambda: _trained(tiny.train_resnet8, tiny.SMALL_SHAPES, epochs=6, held_out=4000),
        speedup=2.5,
        tuning=Tuning(ratio=0.5, epochs=6),
    ),
    Subject(
        name="mobilenet-v1-025",
        text="MobileNetV1 0.25 (MLPerf Tiny), 96x96x3, trained",
        make=lambda: _trained(tiny.train_mobilenet, tiny.TWO_SHAPES, epochs=4, held_out=4000),
        speedup=1.4,
        tuning=Tuning(ratio=0.5, epochs=4),
    ),
    Subject(
        name="ds-cnn",
        text="DS-CNN (MLPerf Tiny), 49x10x1, trained",
        make=lambda: _trained(tiny.train_ds_cnn, tiny.WORDS, epochs=5, held_out=4000),
        tuning=Tuning(ratio=0.5, epochs=5),
    ),
)
