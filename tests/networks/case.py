"""What is stated of a network before it runs, and what a family's module gives back once it is trained.

No figure of the table comes from the rows that judge it. Held-out rows have a generator of their own, apart from that
of the training rows: baselines, floors and ceilings were set on the rows of the seed ``VALIDATION`` (``python -m
networks.floors``, in ``tests``), and the tests judge on those of the seed ``JUDGED``. Where pictures are drawn from
scikit-learn's digits, the two draw from different digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from outrider_exporters import Data
from outrider_exporters.gates import Gate
from outrider_runtimes.processing import Step

Outputs = Mapping[str, np.ndarray]
Predict = Callable[[Mapping[str, np.ndarray]], Outputs]
PREDICT_ROWS = 100  # bounds the activations' memory
VALIDATION, JUDGED = 1, 2  # seeds of held-out rows
POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How good answers are.

    Attributes:
        in_points: int8 may lose 1.0 point of it (it is a share); else 2 % of its float32 value.
    """

    name: str
    higher_is_better: bool = True
    in_points: bool = False

    def better(self, figure: float, bound: float) -> bool:
        return figure > bound if self.higher_is_better else figure < bound

    def loss(self, before: float, after: float) -> float:
        """What is lost from before to after, in bounds: 1.0 is the most that is allowed."""
        worse = before - after if self.higher_is_better else after - before
        return worse / (POINT if self.in_points else 0.02 * abs(before))


ACCURACY = Metric(name="accuracy", in_points=True)
R2 = Metric(name="r2")
RMSE = Metric(name="rmse", higher_is_better=False)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network and what its export takes.

    Attributes:
        samples: how many held-out samples the metric is of, where that is not the number of rows.
        live: ``evaluate`` calls ``predict`` as it likes, with what came out before (decoding); else as ``in_chunks``
            does, once, with the test's inputs.
        baseline: measured, on the same held-out rows: what a rule without the network reaches.
        data: ``test`` is ``(inputs, targets)``; what targets are is between it and ``evaluate``.
        decide: what follows from the network's outputs and the inputs, one decision an element; None where nothing is
            decided.
        preprocessing, postprocessing: the steps around the network; ``example``, ``data`` and what ``predict`` of
            ``evaluate`` takes and gives are then a caller's.
        axes: of the caller's tensors, where they are not the usual ones.
    """

    module: nn.Module
    example: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]
    data: Data
    evaluate: Callable[[Predict, Any], dict[str, float]]
    baseline: float
    live: bool = False
    samples: int = 0
    decide: Callable[[Outputs, Mapping[str, np.ndarray]], np.ndarray] | None = None
    preprocessing: tuple[Step, ...] = ()
    postprocessing: tuple[Step, ...] = ()
    axes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        item: the number in the list of networks that must pass.
        network, data: in words.
        parameters: trainable ones, exactly.
        rule, baseline: what the baseline is in words, and its figure (within 0.03, or 5 %: of 2,000 rows, two
            standard deviations of the difference of two shares).
        floor, ceiling: float32 must lie between them: it has learned, and there is room to lose something.
        forms: the ``Quantize`` scheme that suits the network, by format.
        train: builds, trains (seeded) and describes, with the held-out rows of the seed that it is given.
        shrinks: the quantized files are smaller than the float32 ones.
        keeps: an operator that the ONNX files must have: not unrolled.
        gates: bounds on the metric that the export itself must meet, on all held-out rows.
    """

    name: str
    item: int
    network: str
    data: str
    parameters: int
    metric: Metric
    rule: str
    baseline: float
    floor: float
    ceiling: float
    forms: Mapping[str, str]
    train: Callable[[int], Trained]
    shrinks: bool = True
    keeps: str = ""
    gates: tuple[Gate, ...] = ()


def held_out_rows(seed: int) -> np.random.Generator:
    """Of the held-out rows of a seed; no training row comes from it."""
    return np.random.default_rng([7, seed])


def fit(
    module: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    epochs: int,
    rate: float,
    rows: int = 64,
    seed: int = 0,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Adam with one cycle of the learning rate; the module itself, in evaluation mode."""
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    if x.ndim == 4:  # convolutions train 1.4 times as fast on one core
        x, module = x.contiguous(memory_format=torch.channels_last), module.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    module.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(rows):
            optimizer.zero_grad()
            loss(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return module.to(memory_format=torch.contiguous_format).eval()


def in_chunks(predict: Predict, inputs: Mapping[str, np.ndarray], rows: int = PREDICT_ROWS) -> dict[str, np.ndarray]:
    """The outputs for all rows, a hundred rows at a time."""
    total = len(next(iter(inputs.values())))
    parts = [predict({name: a[at : at + rows] for name, a in inputs.items()}) for at in range(0, total, rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def classes(outputs: Outputs, _: object = None) -> np.ndarray:
    """The class of each row, of the one output."""
    (scores,) = outputs.values()
    return scores.argmax(-1)


def accuracy(predict: Predict, test: Any) -> dict[str, float]:
    inputs, targets = test
    return {"accuracy": float((classes(in_chunks(predict, inputs)) == targets).mean())}


def nearest_mean_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of the class whose mean of the training rows is nearest."""
    means = np.stack([train[labels == k].reshape(np.count_nonzero(labels == k), -1).mean(0) for k in np.unique(labels)])
    flat = test.reshape(len(test), -1)
    distances = (means**2).sum(1) - 2.0 * flat @ means.T
    return float((distances.argmin(1) == targets).mean())


def majority_accuracy(targets: np.ndarray) -> float:
    """Accuracy of always saying the most frequent class."""
    return float(np.bincount(targets).max() / len(targets))


def classifier(
    module: nn.Module,
    train: tuple[np.ndarray, np.ndarray],
    calibration: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    *,
    name: str,
    baseline: float | None = None,
) -> Trained:
    """What a trained network with one input and class scores is, as an export takes it."""
    if baseline is None:
        baseline = nearest_mean_accuracy(*train, *test)
    return Trained(
        module=module,
        example={name: test[0][:2]},
        outputs=("scores",),
        data=Data(calibration={name: calibration}, test=({name: test[0]}, test[1])),
        evaluate=accuracy,
        baseline=baseline,
        decide=classes,
    )
