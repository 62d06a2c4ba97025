"""What the demo's answers were worth. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider_runtimes.tensors import Array, Tensors

Predict = Callable[[Tensors], dict[str, Array]]
BOOTSTRAP_ROUNDS = 2_000
CHUNK = 500


def labels_of(predict: Predict, images: Array) -> NDArray[np.int64]:
    """The labels that a model gives. images: float32 [N, 1, 8, 8] -> int64 [N]."""
    chunks = [predict({"image": images[at : at + CHUNK]})["logits"] for at in range(0, len(images), CHUNK)]
    return np.asarray(np.concatenate(chunks).argmax(axis=1), np.int64)


def margins_of(predict: Predict, images: Array) -> NDArray[np.float64]:
    """The softmax of the best label less that of the second best. images: float32 [N, 1, 8, 8] -> float64 [N]."""
    logits = np.concatenate(
        [predict({"image": images[at : at + CHUNK]})["logits"] for at in range(0, len(images), CHUNK)]
    ).astype(np.float64)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    ordered = np.sort(exponents / exponents.sum(axis=1, keepdims=True), axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def accuracy(predict: Predict, part: Any) -> dict[str, float]:
    """The share of right labels, as ``export`` wants it."""
    return {"accuracy": float(np.mean(labels_of(predict, part.images) == part.labels))}


def margin_threshold(margins: NDArray[np.float64], right: NDArray[np.bool_], *, risk: float) -> float:
    """The lowest margin at and above which the share of wrong answers is at most ``risk``, on these samples.

    A plug-in estimate: it promises nothing about other samples.
    """
    order = np.argsort(-margins, kind="stable")
    wrong = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    kept = np.flatnonzero(wrong <= risk)
    return float(margins[order[kept[-1]]]) if len(kept) else 1.0


def paired_interval(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the difference in accuracy over the same inputs, resampled as pairs."""
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    count = len(difference)
    means = [difference[rng.integers(0, count, count)].mean() for _ in range(BOOTSTRAP_ROUNDS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
