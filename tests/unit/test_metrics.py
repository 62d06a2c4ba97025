"""What is counted of an interval, and what may leave of the inputs."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.inputs import InputGate, InputPolicy
from outrider.telemetry.metrics import (
    MAX_CLASSES,
    MAX_COUNTS,
    MAX_FAILURES,
    Judged,
    Tally,
    judged_of,
    latency_bucket,
    memory_rss_bytes,
)
from outrider.telemetry.record import MAX_RECORD_BYTES, encode_row
from outrider.telemetry.vitals import MAX_BUCKET, MIN_BUCKET, merge_buckets, quantile_ms, read_metrics
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.heat import Heat
from outrider_runtimes.scores import Score, softmax
from outrider_runtimes.tensors import Interface, TensorSpec
from support.clocks import ManualClock
from support.telemetry import BOOT, a_prediction
from support.telemetry_schema import complaints

TEN = Judged(output="logits", dtype=np.dtype("float32"), classes=10, labels=())


def body_of(tally: Tally, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"heat": Heat(), "memory_rss_bytes": None, "drift": None}
    body = tally.body(60.0, **(options | changes))
    assert complaints("metrics", json.loads(json.dumps(body))) == []
    return body


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_a_latency_lies_in_its_bucket(ms: float) -> None:
    k = latency_bucket(ms)
    assert MIN_BUCKET <= k <= MAX_BUCKET
    if MIN_BUCKET < k < MAX_BUCKET:
        assert 2 ** (k / 8) * (1 - 1e-12) <= ms <= 2 ** ((k + 1) / 8) * (1 + 1e-12)


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf, 5e-324])
def test_a_latency_that_is_none_has_a_bucket_too(ms: float) -> None:
    assert latency_bucket(ms) in (MIN_BUCKET, MAX_BUCKET)


def test_histograms_of_two_devices_are_one_by_adding_and_a_quantile_is_within_5_percent() -> None:
    rng = np.random.default_rng(4)
    parts = [rng.lognormal(1.0, 0.8, 5000), rng.lognormal(2.0, 0.3, 3000)]
    bodies = []
    for part in parts:
        tally = Tally(began_s=0.0)
        for ms in part:
            tally.predicted("edge", "local", "v", float(ms))
        bodies.append(body_of(tally))
    merged = merge_buckets(read_metrics(body) for body in bodies)
    everything = np.concatenate(parts)
    assert sum(merged.values()) == 8000
    for q in (0.1, 0.5, 0.95, 0.99):
        assert quantile_ms(merged, q) == pytest.approx(np.quantile(everything, q, method="inverted_cdf"), rel=0.05)
    assert bodies[0]["latency_ms"]["sum"] == pytest.approx(parts[0].sum(), rel=1e-6)
    assert bodies[0]["latency_ms"]["max"] == pytest.approx(parts[0].max(), abs=1e-3)


def test_the_counts_are_by_source_reason_and_variant() -> None:
    tally = Tally(began_s=50.0)
    assert tally.empty
    for source, reason, times in (("edge", "confident", 6), ("cloud", "uncertain", 3), ("edge_degraded", "private", 1)):
        for _ in range(times):
            tally.predicted(source, reason, "onnx-int8", 2.0)
    tally.failed("DeadlineExceeded")
    body = body_of(tally, heat=Heat(celsius=51.5, throttled=True), memory_rss_bytes=4096, drift=0.25)
    assert (body["interval_s"], body["predictions"], body["offload_share"]) == (10.0, 10, 0.3)
    assert [(each["source"], each["count"]) for each in body["counts"]] == [
        ("edge", 6),
        ("cloud", 3),
        ("edge_degraded", 1),
    ]
    assert (body["failures"], body["refused"], body["availability"]) == ({"DeadlineExceeded": 1}, {}, 0.909091)
    assert (body["temperature_c"], body["throttled"], body["memory_rss_bytes"], body["drift"]) == (
        51.5,
        True,
        4096,
        0.25,
    )


def test_nothing_is_a_record_too() -> None:
    body = body_of(Tally(began_s=0.0))
    assert (body["predictions"], body["offload_share"], body["latency_ms"]["buckets"]) == (0, None, [])
    assert body["availability"] is None


def test_a_callers_own_fault_speaks_against_nobody() -> None:
    tally = Tally(began_s=0.0)
    tally.failed("ShapeError", refused=True)
    assert not tally.empty
    tally.predicted("edge", "local", "onnx-int8", 2.0)
    body = body_of(tally)
    assert (body["failures"], body["refused"], body["availability"]) == ({}, {"ShapeError": 1}, 1.0)


def test_a_hostile_interval_stays_within_a_record_and_every_answer_is_counted() -> None:
    rng = random.Random(1)
    labels = tuple(f"{number}" * 3000 for number in range(200))
    judged = Judged(output="y", dtype=np.dtype("float32"), classes=200, labels=labels)
    tally = Tally(began_s=0.0)
    for number in range(2000):
        tally.predicted("edge", f"reason-{number}", "v" * 100, rng.random() * 1e6)
        tally.failed(f"Error{number}")
        tally.failed(f"Error{number}", refused=True)
        tally.judge(judged, np.eye(200, dtype=np.float32)[number % 200].tobytes())
    body = body_of(tally)
    assert len(body["counts"]) == MAX_COUNTS
    assert len(body["classes"]["top"]) == MAX_CLASSES
    assert len(body["failures"]) == len(body["refused"]) == MAX_FAILURES + 1
    assert sum(each["count"] for each in body["counts"]) + body["counts_other"] == body["predictions"] == 2000
    assert sum(count for _, count in body["classes"]["top"]) + body["classes"]["other"] == 2000
    assert sum(body["failures"].values()) == sum(body["refused"].values()) == 2000
    row = encode_row(kind="metrics", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body)
    assert len(row) < MAX_RECORD_BYTES


@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=10, max_size=10), min_size=1, max_size=4))
def test_logits_and_probabilities_are_judged_alike(rows: list[list[float]]) -> None:
    logits = np.array(rows, np.float32)
    odds = softmax(logits.astype(np.float64))
    confidence, classes = TEN.read(logits.tobytes())
    again, same = TEN.read(odds.astype(np.float32).tobytes())
    if not (logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3)):  # logits that look like probabilities
        assert confidence == pytest.approx(odds.max(axis=1).min(), rel=1e-6)
        assert classes == list(logits.argmax(axis=1))
    assert again == pytest.approx(odds.max(axis=1).min(), rel=1e-5)
    assert len(same) == len(rows)


@pytest.mark.parametrize("data", [b"", b"abc", np.full(10, np.nan, np.float32).tobytes(), bytes(41)])
def test_what_cannot_be_judged_is_not_counted(data: bytes) -> None:
    tally = Tally(began_s=0.0)
    tally.judge(TEN, data)
    assert (body_of(tally)["confidence"]["count"], body_of(tally)["classes"]["top"]) == (0, [])


def spec(name: str, *shape: int | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_which_output_is_judged() -> None:
    x, y, z = spec("x", 1, 4), spec("y", None, 3), spec("z", 1, 5)

    def judged(*outputs: TensorSpec, labels: tuple[str, ...] = (), score: object = None) -> Judged | None:
        return judged_of(Interface(inputs=(x,), outputs=outputs, labels=labels), score)

    only = judged(y, labels=("a", "b", "c"))
    assert only is not None
    assert (only.output, only.classes, only.label(2), only.row_bytes) == ("y", 3, "c", 12)
    assert judged(y, z) is None
    rule = judged(y, z, labels=("a", "b", "c"), score=Score(output="z"))
    assert rule is not None
    assert (rule.output, rule.label(2)) == ("z", "2"), "the labels are not those of five classes"
    assert judged(spec("y", 1, 3, 3)) is None
    assert judged(spec("y", 1, 3, dtype="int32")) is None
    assert judged(spec("y", 1, None)) is None
    assert judged(spec("y", 1, 1)) is None
    assert judged_of(None, None) is None


def test_the_memory_is_that_of_this_process(tmp_path: Path) -> None:
    found = memory_rss_bytes()
    assert found is not None
    assert 10**6 < found < 10**12
    assert memory_rss_bytes(tmp_path) is None


INPUTS = {"image": np.array([[0.5, -2.0]], dtype=">f4")}
UNSURE = a_prediction()._replace(source="cloud", reason="uncertain")


def test_inputs_stay_unless_the_policy_lets_them_go() -> None:
    clock = ManualClock()
    assert InputGate(None, clock=clock).body(INPUTS, UNSURE) is None
    gate = InputGate(InputPolicy(), clock=clock)
    assert gate.body(INPUTS, a_prediction()) is None, "the edge was sure"
    body = gate.body(INPUTS, UNSURE)
    assert body is not None
    assert complaints("input", body) == []
    (tensor,) = body["tensors"]
    assert np.frombuffer(base64.b64decode(tensor["data"]), "<f4").tolist() == [0.5, -2.0]
    assert (tensor["dtype"], tensor["shape"]) == ("float32", [1, 2])
    assert InputGate(InputPolicy(flagged_only=False), clock=clock).body(INPUTS, a_prediction())


def test_no_more_inputs_go_in_an_hour_than_the_policy_says_and_none_that_is_too_large() -> None:
    clock = ManualClock()
    gate = InputGate(InputPolicy(per_hour=10, max_bytes=100), clock=clock)
    assert gate.body({"x": np.zeros(26, np.float32)}, UNSURE) is None
    assert gate.body({"x": np.array([object()])}, UNSURE) is None
    gone = 0
    for _ in range(36_000):  # ten hours, one a second
        clock.now_s += 1.0
        gone += gate.body({"x": np.zeros(25, np.float32)}, UNSURE) is not None
    assert 108 <= gone <= 10 + 100
    clock.now_s -= 10_000.0
    assert gate.body(INPUTS, UNSURE) is None, "a clock that goes back earns nothing"


def test_the_largest_input_that_a_policy_lets_go_fits_into_a_record() -> None:
    gate = InputGate(InputPolicy(max_bytes=45_000), clock=ManualClock())
    body = gate.body({"x": np.full(45_000, 255, np.uint8)}, UNSURE)
    assert body is not None
    assert encode_row(kind="input", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body)


def test_an_input_whose_name_is_no_unicode_text_goes_with_question_marks_in_it() -> None:
    gate = InputGate(InputPolicy(), clock=ManualClock())
    unsure = UNSURE._replace(source="edge_degraded", reason="cloud\udcff")
    words = np.array(["\ud800", "ja"])
    body = gate.body({"image\ud83d": np.zeros(1, np.float32), "\udc00": words, "\N{SNOWMAN}": words}, unsure)
    assert body is not None
    assert complaints("input", body) == []
    row = json.loads(encode_row(kind="input", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body))
    assert row["body"]["reason"] == "cloud?"
    names = [tensor["name"] for tensor in row["body"]["tensors"]]
    assert names == ["image?", "?", "\N{SNOWMAN}"]
    assert np.frombuffer(base64.b64decode(row["body"]["tensors"][1]["data"]), words.dtype).tolist() == words.tolist()


def test_inputs_that_a_record_cannot_hold_stay_and_cost_nothing_of_the_hour() -> None:
    gate = InputGate(InputPolicy(max_bytes=45_000, per_hour=1), clock=ManualClock())
    assert gate.body({f"tensor-{number}": np.zeros(10, np.float32) for number in range(1000)}, UNSURE) is None
    assert gate.body({"\N{SNOWMAN}" * 12_000: np.zeros(1, np.float32)}, UNSURE) is None
    most = {f"tensor-{number}": np.zeros(10, np.float32) for number in range(400)}
    while (body := gate.body(most, UNSURE)) is None:
        most.popitem()
    assert len(most) > 300
    row = encode_row(kind="input", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body)
    assert len(row) <= MAX_RECORD_BYTES


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"max_bytes": 45_001}, {"per_hour": 0}, {"per_hour": True}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        InputPolicy(**wrong)


@pytest.mark.parametrize("total_ms", [math.nan, math.inf, -math.inf, -1.0, 1.7e308])
def test_a_wait_that_is_none_is_in_no_sum(total_ms: float) -> None:
    tally = Tally(began_s=0.0)
    tally.predicted("edge", "local", "onnx-int8", 2.0)
    with pytest.raises(ValueError, match="a prediction that took"):
        tally.predicted("edge", "local", "onnx-int8", total_ms)
    body = body_of(tally)
    assert (body["predictions"], body["latency_ms"]["sum"], complaints("metrics", body)) == (1, 2.0, [])


def test_made_up_names_are_cut_and_made_text() -> None:
    tally = Tally(began_s=0.0)
    tally.predicted("edge", "half a pair: \ud800", "\udfff", 1.0)
    tally.failed("Error\ud800")
    tally.judge(Judged(output="y", dtype=np.dtype("float32"), classes=2, labels=("\ud800", "b")), bytes(8))
    for number in range(200):
        tally.predicted("edge", f"{number}" + "r" * 5000, "v" * 5000, 1.0)
        tally.failed(f"{number}" + "E" * 5000)
    row = encode_row(kind="metrics", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body_of(tally))
    assert len(row) < MAX_RECORD_BYTES


def test_what_a_sensor_or_a_source_says_that_is_no_number_is_not_known() -> None:
    body = Tally(began_s=0.0).body(1.0, heat=Heat(celsius=math.nan), memory_rss_bytes=None, drift=math.inf)
    assert (body["temperature_c"], body["drift"], complaints("metrics", body)) == (None, None, [])
