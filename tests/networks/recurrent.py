"""Item 3: recurrent networks, whose last step decides."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from networks.case import ACCURACY, JUDGED, Case, Trained, classifier, fit
from networks.images import digits

STEPS = 8
WIDTH = 64


class LastStep(nn.Module):
    """steps: float32 [N, 8, 8] -> scores: float32 [N, 10]."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.dense = nn.Linear(WIDTH, 10)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.recurrent(steps)
        return self.dense(outputs[:, -1])


def train(kind: type[nn.RNNBase], layers: int, held_out: int = JUDGED) -> Trained:
    """A digit, row after row."""
    torch.manual_seed(0)
    split = digits(train=3000, test=2000, noise=0.1, size=STEPS, held_out=held_out)
    rows = [np.ascontiguousarray(images[:, 0]) for images in (split.train[0], split.calibration, split.test[0])]
    network = fit(LastStep(kind(STEPS, WIDTH, layers, batch_first=True)), rows[0], split.train[1], epochs=12, rate=8e-3)
    return classifier(network, (rows[0], split.train[1]), rows[1], (rows[2], split.test[1]), name="steps")


def _case(kind: type[nn.RNNBase], layers: int, parameters: int) -> Case:
    name = kind.__name__.lower()
    return Case(
        name=name,
        item=3,
        network=f"nn.{kind.__name__} of {WIDTH}, {layers} layer{'s' if layers > 1 else ''}, last step to dense 10",
        data="scikit-learn's digits turned, scaled, moved, noise 0.1, as 8 steps of 8 pixels",
        parameters=parameters,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.66,
        floor=0.80,
        ceiling=0.98,
        forms={"onnx": "weight-only", "tflite": "dynamic"},
        keeps=kind.__name__,
        train=partial(train, kind, layers),
    )


CASES = (_case(nn.RNN, 2, 13_706), _case(nn.LSTM, 1, 19_594), _case(nn.GRU, 1, 14_858))
