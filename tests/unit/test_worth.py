"""Whether quantizing paid, told from the figures."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.worth import Worth, no_better_than_float, worth_of
from support.candidates import candidate


def file(name, ms, size, **more):
    return candidate(name, ms=ms, size=size, accuracy=0.9, **more)


FLOATS = [file("onnx-float32", 0.010, 400), file("tflite-float32", 0.004, 1200)]


def test_where_nothing_beats_float32_it_says_so_with_every_figure():
    """A linear regression: two weights, around which quantizing only wraps operators."""
    worth = worth_of([*FLOATS, file("onnx-static", 0.020, 1800), file("tflite-static", 0.006, 1400)])
    assert worth.text == (
        "no quantized form beats float32: tflite-float32 takes 0.004 ms a row on the exporting host, onnx-float32 has "
        "400 bytes; onnx-static 0.020 ms, 1800 bytes; tflite-static 0.006 ms, 1400 bytes"
    )
    assert (worth.faster, worth.smaller) == ((), ())
    assert list(worth.tried) == ["onnx-float32", "tflite-float32", "onnx-static", "tflite-static"]
    assert worth.tried["tflite-static"] == {"size_bytes": 1400, "latency_ms": 0.006, "accuracy": 0.9, "missed": ""}
    json.dumps(worth.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("ms", "size", "said", "faster", "smaller"),
    [
        (0.002, 300, "tflite-static beats float32 in latency and size", True, True),
        (0.006, 300, "no quantized form is faster than float32, some are smaller", False, True),
        (0.002, 500, "no quantized form is smaller than float32, some are faster", True, False),
    ],
)
def test_each_way_of_beating_is_told_apart(ms, size, said, faster, smaller):
    worth = worth_of([*FLOATS, file("tflite-static", ms, size)])
    assert worth.text.startswith(f"{said}: ")
    assert (bool(worth.faster), bool(worth.smaller)) == (faster, smaller)


def test_one_that_is_faster_and_another_that_is_smaller_beat_in_one_each():
    worth = worth_of([*FLOATS, file("tflite-static", 0.002, 500), file("onnx-weight-only", 0.02, 300)])
    assert worth.text.startswith("no quantized form beats float32 in latency and size both: ")
    assert (worth.faster, worth.smaller) == (("tflite-static",), ("onnx-weight-only",))


def test_within_the_noise_of_a_twin_nothing_is_faster():
    worth = worth_of([*FLOATS, file("tflite-static", 0.003, 1400, noise=0.5)])
    assert worth.faster == ()
    assert "tflite-static 0.003 ms (within noise, 50%), 1400 bytes" in worth.text


def test_what_missed_a_gate_beats_nothing_and_the_reason_stands_beside_its_figures():
    worth = worth_of([*FLOATS, file("tflite-static", 0.001, 100, missed="missed max_drop: 5 points")])
    assert worth.text.startswith("no quantized form beats float32")
    assert worth.text.endswith("100 bytes, missed max_drop: 5 points")


def test_without_quantized_forms_or_without_a_float_there_is_nothing_to_say():
    assert worth_of(FLOATS) == worth_of([file("onnx-static", 1.0, 1)]) == Worth()
    assert Worth().to_dict() == {}
    assert no_better_than_float([file("onnx-static", 1.0, 1)]) == {}


def test_a_variant_says_of_itself_that_it_is_slower_and_no_smaller():
    notes = no_better_than_float([*FLOATS, file("onnx-static", 0.020, 400), file("tflite-static", 0.002, 900)])
    assert notes == {
        "onnx-static": "slower than float32 on the exporting host: 0.020 ms a row, tflite-float32 0.004 ms; "
        "no smaller than float32: 400 bytes, onnx-float32 400"
    }


forms = st.sampled_from(["onnx-float32", "tflite-float32", "onnx-qdq", "tflite-static", "tflite-dynamic"])
files = st.lists(
    st.builds(file, forms, st.floats(0.001, 10.0), st.integers(1, 10**6), noise=st.sampled_from([0.0, 0.4])),
    unique_by=lambda item: item.name,
)


@given(files)
def test_the_verdict_and_the_lists_agree(items):
    worth = worth_of(items)
    floats = [item for item in items if item.family == "float"]
    for item in items:
        if item.name in worth.smaller:
            assert item.size_bytes < min(plain.size_bytes for plain in floats)
        if item.name in worth.faster:
            assert item.latency_ms < min(plain.latency_ms for plain in floats)
    if worth.text:
        assert worth.text.startswith("no quantized form beats float32: ") is (not worth.faster and not worth.smaller)
        assert all(item.name in worth.tried for item in items)
