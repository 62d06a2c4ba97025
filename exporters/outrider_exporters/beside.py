"""How often a variant and its cloud may differ: what a board, which has no labels, tells drift by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outrider.hybrid.judging import differing
from outrider_exporters.certify import Flags, p_value
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Tensors

HALVINGS = 40  # of the interval from 0 to 1: far finer than any share that rows can show


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What stands for the cloud. ``outputs`` by name; ``wrong``: bool [N], whether its answer is."""

    outputs: Tensors
    wrong: Flags


def may_differ(
    score: Score,
    outputs: Tensors,
    keeps: Flags,
    teacher: Teacher | None,
    *,
    alpha: float,
    delta: float,
    by_class: bool,
) -> dict[str, float]:
    """The share of answers in which the first class of the two may differ, while all is as it was certified.

    Every figure that was counted stands as its upper bound, which holds with probability 1 - delta over the rows.

    Args:
        outputs: what the variant gave, by name.
        keeps: bool [N], which of its answers are kept.
        teacher: None where there is none.
        by_class: an answer is wrong where its first class is not the target.

    Returns:
        ``kept``: of the kept answers: two that differ are not both right, so alpha and the teacher's own share of wrong
        answers there; alpha alone without a teacher, which takes the cloud for right; where another notion of wrong
        was certified, the share that differed. ``offloaded``: of the others, the share that differed. What cannot be
        told is left out.
    """
    shares: dict[str, float | None] = {}
    if score.kind == "detection":
        return {}
    if teacher is None:
        shares["kept"] = alpha if by_class else None
    else:
        wrong = at_most(int(teacher.wrong[keeps].sum()), int(keeps.sum()), delta)
        shares["kept"] = alpha + wrong if by_class else _differed(score, outputs, teacher, keeps, delta)
        shares["offloaded"] = _differed(score, outputs, teacher, np.logical_not(keeps), delta)
    return {name: round(share, 6) for name, share in shares.items() if share is not None and share < 1.0}


def _differed(score: Score, outputs: Tensors, teacher: Teacher, rows: Flags, delta: float) -> float | None:
    share, count = differing(score, outputs, teacher.outputs, rows), int(rows.sum())
    return None if share is None else at_most(round(share * count), count, delta)


def at_most(count: int, rows: int, delta: float) -> float:
    """The greatest rate under which so few of so many rows are not unlikely: the upper bound of Clopper and Pearson
    ("The use of confidence or fiducial limits", 1934)."""
    if count >= rows:
        return 1.0
    low, high = count / rows, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(count, rows, middle) > delta else (low, middle)
    return high
