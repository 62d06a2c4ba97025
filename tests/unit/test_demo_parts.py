"""The demo's pure parts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from outrider_exporters.demo.console import Narrator
from outrider_exporters.demo.score import labels_of, margin_threshold, margins_of, paired_interval
from outrider_exporters.demo.stream import device_program, refuse_workstation_imports
from outrider_runtimes.errors import OutriderError


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


def test_a_paired_interval_is_narrower_than_its_parts() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random(2000) < 0.8
    ours = theirs | (rng.random(2000) < 0.1)
    low, high = paired_interval(ours, theirs, rng)
    assert 0.0 < low < float(np.mean(ours) - np.mean(theirs)) < high
    assert paired_interval(theirs, theirs, rng) == (0.0, 0.0)


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
