"""The demo's pure parts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from outrider_exporters.certify import check_enough
from outrider_exporters.demo.console import Narrator
from outrider_exporters.demo.data import STREAM, Part, disturbed
from outrider_exporters.demo.run import certified_if_possible
from outrider_exporters.demo.score import (
    SERVICE_COLUMNS,
    kept_wrong,
    labels_of,
    margin_threshold,
    margins_of,
    paired_interval,
    service_quality,
    service_rows,
)
from outrider_exporters.demo.stream import device_program, refuse_workstation_imports
from outrider_exporters.offload import Offload
from outrider_runtimes.errors import ExportError, OutriderError


def test_margins_and_labels_come_from_the_logits() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]], np.float32))
    images = np.zeros((2, 1, 8, 8), np.float32)

    def predict(inputs: object) -> dict[str, np.ndarray]:
        return {"logits": logits}

    assert labels_of(predict, images).tolist() == [0, 2]
    np.testing.assert_allclose(margins_of(predict, images), [0.5, 0.1], atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_at_the_threshold_is_within_the_risk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    margins = rng.random(500)
    right = rng.random(500) < 0.6 + 0.4 * margins
    threshold = margin_threshold(margins, right, risk=0.05)
    kept = margins >= threshold
    assert threshold == 1.0 or np.mean(~right[kept]) <= 0.05
    lower = np.sort(margins[~kept])[::-1]
    for other in lower:
        assert np.mean(~right[margins >= other]) > 0.05


def test_nothing_is_kept_where_nothing_is_right() -> None:
    assert margin_threshold(np.array([0.2, 0.9]), np.array([False, False]), risk=0.03) == 1.0


def test_what_was_kept_and_wrong_is_of_the_sure_answers_alone() -> None:
    lines = [{"source": source} for source in ("edge", "edge", "edge", "edge", "cloud", "edge_degraded", None)]
    right = np.array([True, False, True, True, False, False, False])
    assert kept_wrong(lines, right) == 0.25
    assert kept_wrong(lines[4:], right[4:]) is None


def test_where_no_threshold_can_be_certified_the_bundle_is_made_without() -> None:
    asked: list[Offload | None] = []
    say = Narrator(io.StringIO(), steps=1)

    def make(offload: Offload | None) -> str:
        asked.append(offload)
        if offload is not None:
            check_enough(30, offload.alpha, offload.delta)
        return "a bundle"

    def refuse(offload: Offload | None) -> str:
        try:
            return make(offload)
        except ExportError as error:
            raise ExportError(f"offload: {error}") from None

    wanted = Offload(alpha=0.05, delta=0.1)
    made, why = certified_if_possible(refuse, wanted, say)
    assert (made, asked) == ("a bundle", [wanted, None])
    assert "it takes 45" in why
    assert certified_if_possible(make, Offload(alpha=0.5), say) == ("a bundle", "")
    with pytest.raises(ExportError, match="30 calibration rows"):
        certified_if_possible(make, wanted, say)


def test_a_paired_interval_is_narrower_than_its_parts() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random(2000) < 0.8
    ours = theirs | (rng.random(2000) < 0.1)
    low, high = paired_interval(ours, theirs, rng)
    assert 0.0 < low < float(np.mean(ours) - np.mean(theirs)) < high
    assert paired_interval(theirs, theirs, rng) == (0.0, 0.0)


def test_service_quality_counts_every_answer_by_its_reason() -> None:
    lines = [{"source": "edge", "reason": "confident", "total_ms": float(ms)} for ms in range(1, 101)]
    lines += [{"source": "cloud", "reason": "uncertain", "total_ms": 20.0}] * 3
    lines += [{"source": None, "reason": "DeadlineExceeded: neither side answered in time"}] * 2
    total, edge, cloud, none = service_quality(lines)
    assert (total["source"], total["requests"], total["availability"]) == ("all", 105, 103 / 105)
    assert (edge["reason"], edge["availability"], edge["mean_ms"], edge["p50_ms"]) == ("confident", 1.0, 50.5, 50.5)
    assert edge["p95_ms"] == pytest.approx(np.percentile(np.arange(1, 101), 95))
    assert (cloud["reason"], cloud["requests"], cloud["p99_ms"]) == ("uncertain", 3, 20.0)
    assert (none["reason"], none["availability"], none["mean_ms"]) == ("DeadlineExceeded", 0.0, None)
    rows = service_rows([total, none])
    assert {len(row) for row in rows} == {len(SERVICE_COLUMNS)}
    assert rows[0][3] == "98.10%"
    assert rows[1] == ["none", "DeadlineExceeded", "2", "0.00%", "", "", "", ""]


def test_an_image_is_taken_once_or_drawn() -> None:
    rng = np.random.default_rng(0)
    part = Part(images=np.zeros((20, 1, 8, 8), np.float32), labels=np.arange(20))
    once = disturbed(part, None, STREAM, rng)
    assert once.labels.tolist() == list(range(20))
    assert once.images.max() > 0.0
    drawn = disturbed(part, 50, STREAM, rng)
    assert len(drawn.labels) == 50
    assert len(set(drawn.labels.tolist())) < 20 + 1


def test_the_import_log_of_a_workstation_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "device.log"
    good = "import time:       100 |        200 | numpy\nimport time:        10 |         20 |   outrider.model\n"
    log.write_text(good)
    refuse_workstation_imports(log)
    log.write_text(good + "import time:        10 |         20 |     torch.nn\n")
    with pytest.raises(OutriderError, match="torch"):
        refuse_workstation_imports(log)
    log.write_text("Traceback\n")
    with pytest.raises(OutriderError, match="incomplete"):
        refuse_workstation_imports(log)


def test_the_device_is_the_board_s_own_program() -> None:
    assert device_program().parts[-3:] == ("firmware_examples", "raspberry_pi", "device.py")


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    say = Narrator(stream, steps=2)
    with say.step("count"), say.progress("counted", 8) as advance:
        for done in range(9):
            advance(done)
    say.table("Result", ["what", "how many"], [["things", "8"]])
    text = stream.getvalue()
    assert "1/2 count" in text
    assert text.count("counted: ") == 4
    assert "\x1b" not in text
    assert "things" in text
