"""Whether a certified threshold keeps its promise: many splits of a population whose true risk is counted.

The promise: at alpha 1 %, delta 10 %, the risk among the answers that are kept, judged on 50,000 rows or more, is above
alpha in at most 28 of 200 splits (delta of them are 20; more than 28 would be seen by chance in 2 % of runs). Beside
it what people use: the lowest margin whose observed risk on the same rows is alpha, and a softmax of 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.glyphs import draw_glyphs
from benchmarks.measure import say
from benchmarks.promise import at_least, at_most
from outrider_exporters.certify import certify
from outrider_exporters.demo.score import margin_threshold
from outrider_runtimes.errors import ExportError
from outrider_runtimes.scores import Score, softmax

ALPHA, DELTA = 0.01, 0.1
SPLITS, MOST_VIOLATED = 200, 28
MOST_REFUSED = 0.1  # of the splits
TRAIN_ROWS, EPOCHS = 12_000, 15
POPULATION_ROWS, LEAST_JUDGED = 60_000, 50_000
CERTIFICATION_ROWS, PLACES_ROWS = 2_000, 500
KINDS = ("margin", "entropy")
PLUG_IN, MAX_SOFTMAX, SOFTMAX_LEVEL = "plug-in margin", "max-softmax 0.9", 0.9
NEVER = np.inf  # a threshold that keeps nothing

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def run(folder: Path) -> dict[str, Any]:
    """Train, draw the population, split and judge. Returns what is stored as ``results/risk.json``."""
    from benchmarks.pair import logits_of, small_network, train

    say(f"risk: training on {TRAIN_ROWS} glyphs")
    network = train(small_network(), draw_glyphs(TRAIN_ROWS, np.random.default_rng(0)), epochs=EPOCHS)
    population = draw_glyphs(POPULATION_ROWS, np.random.default_rng(1))
    logits = logits_of(network, population.images)
    wrong = logits.argmax(1) != population.labels
    say(f"risk: {SPLITS} splits of {POPULATION_ROWS} rows, {np.mean(wrong):.2%} of them answered wrongly")
    return judged_splits(logits, wrong, splits=SPLITS, rng=np.random.default_rng(2))


def judged_splits(
    logits: NDArray[np.float32], wrong: Flags, *, splits: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw certification rows, take every threshold from them, judge it on all the others; so many times.

    Args:
        logits: float [N, classes], of the whole population; wrong: bool [N].
    """
    outputs = {"y": logits}
    scores = {kind: Score(kind=kind, output="y").rows(outputs) for kind in KINDS}
    surest = softmax(logits.astype(np.float64)).max(axis=1)
    risks: dict[str, list[tuple[float, float]]] = {name: [] for name in (*KINDS, PLUG_IN, MAX_SOFTMAX)}
    for _ in range(splits):
        drawn = rng.permutation(len(wrong))
        places, rows = drawn[:PLACES_ROWS], drawn[PLACES_ROWS : PLACES_ROWS + CERTIFICATION_ROWS]
        rest = drawn[PLACES_ROWS + CERTIFICATION_ROWS :]
        for kind in KINDS:
            level = _certified(scores[kind][rows], wrong[rows], scores[kind][places])
            risks[kind].append(_judged(scores[kind][rest], wrong[rest], level))
        level = margin_threshold(scores["margin"][rows], ~wrong[rows], risk=ALPHA)
        risks[PLUG_IN].append(_judged(scores["margin"][rest], wrong[rest], level))
        risks[MAX_SOFTMAX].append(_judged(surest[rest], wrong[rest], SOFTMAX_LEVEL))
    return _figures({name: np.array(pairs) for name, pairs in risks.items()}, wrong)


def _certified(scores: Floats, wrong: Flags, places: Floats) -> float:
    try:
        return certify(scores, wrong, places, alpha=ALPHA, delta=DELTA).chosen.threshold
    except ExportError:
        return NEVER


def _judged(scores: Floats, wrong: Flags, threshold: float) -> tuple[float, float]:
    """The risk among what is kept, and the share that is."""
    kept = scores >= threshold
    return (float(wrong[kept].mean()) if kept.any() else 0.0), float(kept.mean())


def _figures(risks: Mapping[str, Floats], wrong: Flags) -> dict[str, Any]:
    found = {
        name: {
            "violated": int((pairs[:, 0] > ALPHA).sum()),
            "refused": int((pairs[:, 1] == 0.0).sum()),
            "risk_mean": float(pairs[:, 0].mean()),
            "risk_most": float(pairs[:, 0].max()),
            "kept_mean": float(pairs[:, 1].mean()),
        }
        for name, pairs in risks.items()
    }
    splits = len(risks[PLUG_IN])
    judged = len(wrong) - CERTIFICATION_ROWS - PLACES_ROWS
    promises = [
        at_most(f"splits of {splits} in which the certified {kind} threshold's risk is above {ALPHA:g}",
                found[kind]["violated"], MOST_VIOLATED) for kind in KINDS
    ]  # fmt: skip
    # A split without a threshold breaks no promise; were most of them so, the line above would say nothing.
    promises += [
        at_most(f"splits of {splits} that certify no {kind} threshold", found[kind]["refused"], MOST_REFUSED * splits)
        for kind in KINDS
    ]
    return {
        "alpha": ALPHA,
        "delta": DELTA,
        "splits": splits,
        "certification_rows": CERTIFICATION_ROWS,
        "wrong": float(wrong.mean()),
        "certified": list(KINDS),
        "thresholds": found,
        "promises": [*promises, at_least("rows that judge each threshold", judged, LEAST_JUDGED)],
    }
