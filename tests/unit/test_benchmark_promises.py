"""The lines of the exporters' benchmark: bounds are kept or missed by the figures alone, and shown either way."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from benchmarks import readme
from benchmarks.exporters import picture
from benchmarks.exporters.labels import AEQ_DEFAULT, GIVEN_FLOAT, ORT_DEFAULT, PEERS
from benchmarks.exporters.promises import (
    LEAST_GAIN_SHARE,
    MOST_SIZE,
    accuracy_lines,
    all_lines,
    difference,
    pruning_line,
    size_lines,
    speed_lines,
)
from benchmarks.promise import at_most

INT8, FLOAT = "ours: tflite-int8", "ours: onnx-float32"


def file(size: int, weights: int, *, is_float: bool, form: str = "tflite") -> dict:
    return {"file": "x", "format": form, "float": is_float, "size_bytes": size, "weight_bytes": weights}


def made(*, small: int = 2600, small_weights: int = 2450) -> dict:
    weights, plain = 9800, 10_000
    files = {INT8: file(small, small_weights, is_float=False), FLOAT: file(10_100, weights, is_float=True, form="onnx")}
    files |= {
        name: file(10_000 if peer.is_float else 2700, weights, is_float=peer.is_float) for name, peer in PEERS.items()
    }
    candidates = {"tflite-float32": {"size_bytes": plain}, "onnx-float32": {"size_bytes": 10_100}}
    return {"kept": [INT8, FLOAT], "chosen": INT8, "files": files, "candidates": candidates}


def pair(one: str, other: str, value: float) -> dict:
    return {"of": one, "over": other, "value": value, "low": 0.98 * value, "high": 1.02 * value}


def result(*, gain: float = 3.0, over_peer: float = 1.0, valid: bool = True) -> dict:
    return {
        "network": "A network, 8x8x1",
        "chosen": INT8,
        "files": made()["files"],
        "latency": {"valid": valid, "p50_us": {INT8: 100.0, FLOAT: 300.0, **dict.fromkeys(PEERS, 310.0)}},
        "pairs": {
            "best int8 over best fp32": pair(INT8, FLOAT, 1 / gain),
            "chosen over best peer": pair(INT8, AEQ_DEFAULT, over_peer),
            "chosen over best peer" + GIVEN_FLOAT: pair(INT8, AEQ_DEFAULT + GIVEN_FLOAT, 0.8 * over_peer),
            f"{INT8} over best fp32": pair(INT8, FLOAT, 1 / gain),
        },
    }


def pruning(*, time: float = 0.5, macs: int = 400, valid: bool = True) -> dict:
    return {
        "macs": {"unpruned": 1000, "pruned": macs},
        "accuracy": {"unpruned": 0.9, "pruned": 0.88},
        "latency": {"valid": valid, "ratios": {"pruned": {"value": time, "low": 0.98 * time, "high": 1.02 * time}}},
    }


@pytest.mark.parametrize(("small", "met"), [(2700, True), (2701, False)])
def test_the_file_counts_where_it_is_mostly_weights(small: int, met: bool) -> None:
    (line,) = size_lines(made(small=small, small_weights=2600))
    assert (line.file, line.measured, line.asked, line.met) == (INT8, small / 10_000, MOST_SIZE, met)
    assert "over the float32 file" in line.promise


@pytest.mark.parametrize(("weights", "met"), [(2450, True), (2646, True), (2647, False)])
def test_the_weights_count_elsewhere_and_the_whole_file_is_stated(weights: int, met: bool) -> None:
    (line,) = size_lines(made(small=4000, small_weights=weights))
    assert line.promise == "int8 weights over float32 weights"
    assert (line.measured, line.met) == (weights / 9800, met)
    assert line.note == f"4000 of 10000 bytes (0.400); {4000 - weights} of them are no weights"


@pytest.mark.parametrize(("gain", "met"), [(2.9, True), (2.7, False)])
def test_the_speedup_is_asked_where_a_bound_is_stated(gain: float, met: bool) -> None:
    line, *_ = speed_lines(2.8, result(gain=gain))
    assert line.measured == pytest.approx(gain)
    assert line.met is met
    assert line.interval is not None
    assert line.interval[0] < gain < line.interval[1]
    assert all("best int8 time" not in other.promise for other in speed_lines(0.0, result()))


def test_a_kept_file_that_is_slower_than_float32_is_a_missed_line() -> None:
    never_slower, beside, beside_given_float = speed_lines(0.0, result(gain=0.9, over_peer=1.06))
    assert not never_slower.met
    assert never_slower.asked == 1.0
    assert not beside.met
    assert AEQ_DEFAULT in beside.note
    assert beside_given_float.met
    assert GIVEN_FLOAT in beside_given_float.promise


def test_a_noisy_run_says_so_in_every_line_about_time() -> None:
    lines = [*speed_lines(2.8, result(valid=False)), pruning_line(pruning(valid=False))]
    assert all(line.noisy for line in lines)
    assert not any(line.noisy for line in speed_lines(2.8, result()))


def test_accuracy_is_compared_row_by_row_with_both_defaults() -> None:
    ours, ort, aeq = np.ones(1000, bool), np.ones(1000, bool), np.ones(1000, bool)
    ours[:20] = False
    aeq[:50] = False
    lines = list(accuracy_lines({INT8: ours, ORT_DEFAULT: ort, AEQ_DEFAULT: aeq}, [INT8, FLOAT], made()["files"]))
    assert [line.measured for line in lines] == pytest.approx([2.0, -3.0])
    assert [line.met for line in lines] == [False, True]
    assert lines[0].note.startswith("98.00% against 100.00% of 1000 rows; their difference is known to 0.87 points")
    assert lines[0].interval == pytest.approx((1.13, 2.87), abs=0.01)


def test_the_interval_of_a_paired_difference_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        before = rng.random(2000) < 0.9
        after = np.where(rng.random(2000) < 0.1, rng.random(2000) < 0.8, before)  # a point worse on average
        points, noise = difference(before, after)
        held += abs(points - 1.0) <= noise
    assert 270 <= held <= 299


@pytest.mark.parametrize(("time", "met"), [(0.6, True), (0.7, False)])
def test_pruning_is_judged_by_its_share_of_the_gain(time: float, met: bool) -> None:
    line = pruning_line(pruning(time=time))
    assert line.measured == pytest.approx(1 / time / 2.5)
    assert (line.met, line.asked) == (met, LEAST_GAIN_SHARE)
    assert "2.0 points below the unpruned network given the same extra training" in line.note


@pytest.mark.parametrize(
    ("valid", "said"), [(True, ":"), (False, "; 4 were measured while the machine was too noisy:")]
)
def test_a_missed_bound_stands_in_the_readme_with_its_figure(tmp_path, valid: bool, said: str) -> None:
    for name in set(readme.SECTIONS) - {"exporters"}:
        (tmp_path / f"{name}.json").write_bytes((readme.RESULTS / f"{name}.json").read_bytes())
    subject = result(gain=2.0, valid=valid)
    subject["promises"] = [asdict(line) for line in all_lines(2.8, made(), subject)]
    environment = json.loads((readme.RESULTS / "exporters.json").read_text())["environment"]
    (tmp_path / "exporters.json").write_text(json.dumps({"environment": environment, "subjects": {"a": subject}}))
    text = readme.figures(tmp_path)
    assert "missed, A network, ours: tflite-int8: best float32 time over best int8 time: 2.000, 2.8 was asked" in text
    assert f"Of 5 bounds on size, speed, accuracy and pruning 4 were met{said}\n" in text
    assert "| A network, 8x8x1 | 10 | 3 | 0.300 | 0.100 | 2.00 (1.96 to 2.04) | 1.00 (0.98 to 1.02) |" in text


def test_what_was_missed_elsewhere_stands_in_the_readme_too(tmp_path) -> None:
    for name in readme.SECTIONS:
        (tmp_path / f"{name}.json").write_bytes((readme.RESULTS / f"{name}.json").read_bytes())
    client = json.loads((tmp_path / "client.json").read_text())
    kept, missed = at_most("one thing", 0.5, 1.0), at_most("another", 1.25, 1.0)
    (tmp_path / "client.json").write_text(json.dumps(client | {"promises": [kept, missed]}))
    text = readme.figures(tmp_path)
    assert "\n- The client: another: 1.25, 1 was asked" in text
    assert "one thing" not in text
    assert "## The client" in readme.page(tmp_path)


@pytest.mark.slow  # loads matplotlib
def test_the_picture_is_drawn_and_small(tmp_path) -> None:
    path = picture.draw({"subjects": {"a": result(), "b": result(gain=0.8)}}, tmp_path / "images" / "exporters.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 10_000 < len(content) < 300_000


def test_a_result_of_another_processor_than_the_rest_names_its_own(tmp_path) -> None:
    processors = {"overhead": "Rocket 3", "cascade": "Rocket 4"}
    for name in readme.SECTIONS:
        result = json.loads((readme.RESULTS / f"{name}.json").read_text())
        result["environment"]["processor"] = processors.get(name, "Rocket 3")
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for text in (readme.figures(tmp_path), readme.page(tmp_path)):
        assert "Measured on Rocket 3, " in text
        assert text.count("\n\nThis was measured on Rocket 4.\n") == text.count("This was measured") == 1
