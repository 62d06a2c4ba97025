"""What the demo's answers were worth. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Array, Tensors

Predict = Callable[[Tensors], dict[str, Array]]
BOOTSTRAP_ROUNDS = 2_000
CHUNK = 500
MARGIN = Score(output="logits")
PERCENTILES = (50, 95, 99)
SERVICE_COLUMNS = ("answered by", "reason", "requests", "availability", "mean ms", "p50", "p95", "p99")


def labels_of(predict: Predict, images: Array) -> NDArray[np.int64]:
    """The labels that a model gives. images: float32 [N, 1, 8, 8] -> int64 [N]."""
    chunks = [predict({"image": images[at : at + CHUNK]})["logits"] for at in range(0, len(images), CHUNK)]
    return np.asarray(np.concatenate(chunks).argmax(axis=1), np.int64)


def margins_of(predict: Predict, images: Array) -> NDArray[np.float64]:
    """The softmax of the best label less that of the second best. images: float32 [N, 1, 8, 8] -> float64 [N]."""
    return np.concatenate(
        [MARGIN.rows(predict({"image": images[at : at + CHUNK]})) for at in range(0, len(images), CHUNK)]
    )


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


def kept_wrong(answers: Sequence[Mapping[str, Any]], right: NDArray[np.bool_]) -> float | None:
    """The share of wrong answers among those that the board kept, being sure; None where it kept none.

    Args:
        answers: the device's lines.
        right: bool [N], whether each is.
    """
    kept = np.array([line["source"] == "edge" for line in answers], bool)
    return float(np.mean(~right[kept])) if kept.any() else None


def service_quality(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What callers had of each kind of answer, the commonest first, after one row for all.

    Args:
        answers: the device's lines: ``source`` (None where nobody answered), ``reason``, and ``total_ms`` of an answer.

    Returns:
        Rows of ``source``, ``reason``, ``requests``, ``availability`` (share that was answered, 0 to 1), and
        ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` of what was; None where nothing was.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in answers:
        kind = (
            ("none", line["reason"].partition(":")[0]) if line["source"] is None else (line["source"], line["reason"])
        )
        groups.setdefault(kind, []).append(line)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_quality("all", "", answers), *(_quality(source, reason, lines) for (source, reason), lines in ordered)]


def service_rows(quality: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """As a table has it, under ``SERVICE_COLUMNS``."""
    return [
        [row["source"], row["reason"], f"{row['requests']:,}", f"{row['availability']:.2%}"]
        + ["" if row[key] is None else f"{row[key]:.2f}" for key in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")]
        for row in quality
    ]


def _quality(source: str, reason: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = np.array([line["total_ms"] for line in lines if line["source"] is not None], np.float64)
    percentiles = np.percentile(times, PERCENTILES) if times.size else [None] * len(PERCENTILES)
    return {
        "source": source,
        "reason": reason,
        "requests": len(lines),
        "availability": times.size / len(lines) if lines else 0.0,
        "mean_ms": float(times.mean()) if times.size else None,
        **{f"p{share}_ms": value for share, value in zip(PERCENTILES, map(_number, percentiles), strict=True)},
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def paired_interval(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the difference in accuracy over the same inputs, resampled as pairs."""
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    count = len(difference)
    means = [difference[rng.integers(0, count, count)].mean() for _ in range(BOOTSTRAP_ROUNDS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
