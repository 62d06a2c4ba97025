"""How often two sides may differ, as the export writes it: the bounds hold, and a board reads what was written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.bundle import OffloadRule
from outrider.hybrid.audits import may_differ as read
from outrider_exporters.beside import Teacher, at_most, may_differ
from outrider_exporters.certify import p_value
from outrider_runtimes.scores import Score

SCORE = Score(output="logits")
CLASSES = 3


def logits(classes: np.ndarray) -> dict[str, np.ndarray]:
    return {"logits": np.eye(CLASSES, dtype=np.float32)[classes]}


def sides(rows: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Targets, what the edge and the teacher say, and which rows are kept: bool [N]."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, rows)
    keeps = rng.random(rows) < 0.8
    edge = np.where(rng.random(rows) < np.where(keeps, 0.01, 0.3), (targets + 1) % CLASSES, targets)
    teacher = np.where(rng.random(rows) < 0.02, (targets + 2) % CLASSES, targets)
    return targets, edge, teacher, keeps


def shares(score: Score = SCORE, *, teacher: bool = True, by_class: bool = True) -> dict[str, float]:
    targets, edge, said, keeps = sides()
    beside = Teacher(outputs=logits(said), wrong=said != targets) if teacher else None
    return may_differ(score, logits(edge), keeps, beside, alpha=0.01, delta=0.1, by_class=by_class)


def test_kept_is_alpha_and_the_teachers_errors_offloaded_is_what_differed():
    targets, edge, said, keeps = sides()
    found = shares()
    assert found["kept"] == pytest.approx(
        0.01 + at_most(int((said != targets)[keeps].sum()), int(keeps.sum()), 0.1), abs=1e-6
    )
    differed = int((edge != said)[~keeps].sum())
    assert found["offloaded"] == pytest.approx(at_most(differed, int((~keeps).sum()), 0.1), abs=1e-6)
    assert differed / (~keeps).sum() < found["offloaded"] < differed / (~keeps).sum() + 0.1
    assert (edge != said)[keeps].mean() < found["kept"]


def test_without_a_teacher_the_cloud_is_taken_for_right_and_another_notion_of_wrong_for_unknown():
    assert shares(teacher=False) == {"kept": 0.01}
    assert shares(teacher=False, by_class=False) == {}
    _, edge, said, keeps = sides()
    differed = at_most(int((edge != said)[keeps].sum()), int(keeps.sum()), 0.1)
    assert shares(by_class=False)["kept"] == pytest.approx(differed, abs=1e-6)
    assert shares(Score(kind="detection", output="logits")) == {}


def test_where_everything_is_kept_nothing_is_said_of_the_others():
    targets, edge, said, keeps = sides()
    teacher = Teacher(outputs=logits(said), wrong=said != targets)
    every = np.ones_like(keeps)
    assert set(may_differ(SCORE, logits(edge), every, teacher, alpha=0.01, delta=0.1, by_class=True)) == {"kept"}


def test_a_board_reads_what_the_export_wrote():
    rule = OffloadRule(
        score=SCORE, alpha=0.01, delta=0.1, rows=1000, thresholds={"v": 0.5}, measured={"v": {"may_differ": shares()}}
    )
    assert read(rule, "v", "kept") == shares()["kept"]
    assert read(rule, "v", "offloaded") == shares()["offloaded"]


@settings(deadline=None)
@given(st.integers(1, 300), st.data(), st.sampled_from([0.01, 0.1, 0.3]))
def test_the_bound_is_where_so_few_become_unlikely(rows, data, delta):
    count = data.draw(st.integers(0, rows))
    bound = at_most(count, rows, delta)
    assert count / rows <= bound <= 1.0
    if count < rows:
        assert p_value(count, rows, bound) == pytest.approx(delta, rel=1e-3)


def test_the_bound_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    counts = rng.binomial(200, 0.05, 500)
    covered = np.mean([at_most(int(count), 200, 0.1) >= 0.05 for count in counts])
    assert covered >= 0.9 - 3 * np.sqrt(0.09 / 500)
