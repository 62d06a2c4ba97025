"""The benchmarks' statistics, on times whose answer is known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks import readme
from benchmarks.measure import PACKAGES, TRIES, WARM_UP_CALLS, compare_calls, environment, interleaved
from benchmarks.stats import TWIN_LIMIT, compare, ratio

TWIN = "base (twin)"


def times(median_ns: float, *, seed: int, blocks: int = 40, calls: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return median_ns * (1.0 + 0.02 * rng.standard_normal((blocks, calls)))


def test_a_ratio_and_its_interval_hold_the_truth() -> None:
    found = ratio(times(1500, seed=1), times(1000, seed=2), np.random.default_rng(0))
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(1.5, rel=0.01)
    assert found.low < 1.5 < found.high


def test_drift_that_both_sides_share_cancels() -> None:
    drift = np.linspace(1.0, 3.0, 40)[:, np.newaxis]
    found = ratio(times(2000, seed=1) * drift, times(1000, seed=2) * drift, np.random.default_rng(0))
    assert found.value == pytest.approx(2.0, rel=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(60):
        found = ratio(times(1200, seed=2 * seed), times(1000, seed=2 * seed + 1), rng)
        covered += found.low <= 1.2 <= found.high
    assert covered >= 50


def test_a_noisy_twin_makes_the_run_invalid() -> None:
    rng = np.random.default_rng(0)
    runs = {"raw": times(1000, seed=1), "ours": times(1100, seed=2)}
    assert compare({**runs, "twin": times(1000, seed=3)}, base="raw", twin="twin", rng=rng).valid
    off = times(1000 * (1 + 2 * TWIN_LIMIT), seed=3)
    found = compare({**runs, "twin": off}, base="raw", twin="twin", rng=rng)
    assert not found.valid
    assert set(found.ratios) == {"ours"}


def test_blocks_run_every_contender_in_an_order_of_their_own() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleaved(calls, blocks=20, calls_a_block=3, rng=np.random.default_rng(0))
    assert {name: array.shape for name, array in found.items()} == dict.fromkeys("abc", (20, 3))
    assert all((array > 0).all() for array in found.values())
    firsts = {tuple(dict.fromkeys(order[at : at + 24])) for at in range(0, len(order), 24)}
    assert len(firsts) > 1


def test_a_twin_that_differs_is_measured_again_and_then_the_run_is_invalid() -> None:
    counts = {"base": 0, "other": 0, "twin": 0}

    def call(name: str, work: int) -> None:
        counts[name] += 1
        sum(range(work))

    found, behind = compare_calls(
        {"base": lambda: call("base", 1), "other": lambda: call("other", 1)},
        base="base",
        blocks=3,
        calls_a_block=4,
        twin=lambda: call("twin", 50_000),
    )
    assert not found.valid
    assert found.twin.value > 2.0
    assert counts == dict.fromkeys(counts, TRIES * 3 * (WARM_UP_CALLS + 4))
    assert {name: array.shape for name, array in behind.items()} == dict.fromkeys(
        ("base", "other", "base (twin)"), (3, 4)
    )


def test_the_environment_names_the_commit_and_the_packages() -> None:
    found = environment()
    assert re.fullmatch(r"|[0-9a-f]{40}( with changes)?", found["commit"])
    assert set(found["packages"]) == set(PACKAGES)


def test_an_invalid_result_says_so_on_the_page(tmp_path: Path) -> None:
    marked = 0
    for name in readme.SECTIONS:
        text = (readme.RESULTS / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(text.replace('"valid": false', '"valid": true'))
    for name in ("overhead", "variants", "exporters"):
        result = json.loads((readme.RESULTS / f"{name}.json").read_text())
        parts = {"overhead": "variants", "exporters": "subjects"}.get(name)
        found = list(result[parts].values()) if parts else [result]
        for comparison in found if name == "overhead" else [item["latency"] for item in found]:
            comparison["valid"] = False
            marked += 1
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert readme.page(tmp_path).count("INVALID") == marked > 3


def test_only_what_is_between_the_marks_is_replaced() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.replaced(text, "new") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
