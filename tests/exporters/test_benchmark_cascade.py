"""The cascade's benchmark with few rows: trained, exported, certified, answered both ways. No figure is a promise."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import cascade, shown
from benchmarks.glyphs import draw_glyphs

pytestmark = pytest.mark.slow

TEST_ROWS, ENDPOINT_ROWS = 400, 25


def test_a_small_cascade_is_whole_and_its_figures_hold_together(tmp_path):
    rng = np.random.default_rng(0)
    parts = [draw_glyphs(rows, rng) for rows in (2_000, 300, 100, TEST_ROWS)]
    report = cascade.export_pair(parts, tmp_path, epochs=(2, 2, 1), alpha=0.2)
    found = cascade.answered(report, parts[3], tmp_path, endpoint_rows=ENDPOINT_ROWS)
    assert found["rows"] == {"test": TEST_ROWS, "through_the_endpoint": ENDPOINT_ROWS}
    assert 0.0 < found["offloaded"] < 1.0
    right = found["accuracy"]
    assert 0.5 < right["edge"] <= 1.0
    low, high = found["hybrid_minus_cloud_points_interval"]
    assert low < found["hybrid_minus_cloud_points"] < high
    assert found["hybrid_minus_cloud_points"] == pytest.approx(100 * (right["hybrid"] - right["cloud"]))
    assert found["certified"]["accuracy_kept"] >= 0.8
    points, share, same = found["promises"]
    assert (points["measured"], share["measured"]) == (low, found["offloaded"])
    assert points["met"] is (low >= -0.3)
    assert same["measured"] == 1.0
    assert same["met"]
    text = shown.cascade(found)
    assert f"{right['hybrid']:.2%} of both together" in text
    assert text.count("missed") == sum(not line["met"] for line in found["promises"])
