"""Choosing is pure: figures of candidates in, what a target gets out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.choose import (
    LATENCY_NOISE,
    MOST,
    choose,
    formats_of,
    noise_of,
    resolved,
    speaks_for,
)
from outrider_runtimes.board import Board
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.targets import TARGETS, target_named
from support.candidates import candidate

AVX2 = ["sse4_2", "avx", "avx2", "fma", "f16c"]
VNNI = Board(
    machine="x86_64", features=frozenset([*AVX2, "avx512f", "avx512_vnni"]), cpus=2, memory_bytes=0, python="3.11.9"
)
PLAIN = dataclasses.replace(VNNI, features=frozenset(AVX2))
PI5 = dataclasses.replace(VNNI, machine="aarch64", features=TARGETS["pi5"].features)


FLOATS = [candidate("onnx-float32", ms=1.0, size=4000), candidate("tflite-float32", ms=1.2, size=3900)]


# --- when a host's latency says something of a target


@pytest.mark.parametrize(
    ("host", "target", "answer"),
    [
        (VNNI, "native", True),
        (PLAIN, "native", True),
        (PLAIN, "x86-avx2", True),
        (VNNI, "x86-avx2", False),
        (VNNI, "pi4", False),
        (VNNI, "pi5", False),
        (PI5, "pi5", True),
        (PI5, "jetson-orin", True),
        (PI5, "pi4", False),
    ],
)
def test_a_host_speaks_for_targets_with_its_own_int8_instructions(host, target, answer):
    assert speaks_for(host, resolved(target, host)) is answer


def test_a_host_without_the_targets_other_features_does_not_speak_for_it():
    bare = dataclasses.replace(PLAIN, features=frozenset(["sse4_2"]))
    assert not speaks_for(bare, target_named("x86-avx2"))


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match="no target 'pi9'"):
        resolved("pi9", VNNI)


def test_formats_follow_the_engines():
    assert formats_of(target_named("pi4")) == {"onnx", "tflite"}
    assert formats_of(target_named("pi-32bit")) == {"tflite"}


# --- measured


def test_the_fastest_of_each_format_and_the_fastest_float_are_kept():
    given_ = [
        *FLOATS,
        candidate("onnx-qdq-s8s8", ms=0.6),
        candidate("onnx-qdq-u8s8", ms=0.3),
        candidate("onnx-qoperator-u8s8", ms=0.5),
        candidate("tflite-static", ms=0.4),
        candidate("tflite-dynamic", ms=0.5),
    ]
    choice = choose(given_, resolved("native", VNNI), VNNI)
    assert choice.measured
    assert choice.kept == ("onnx-qdq-u8s8", "tflite-static", "onnx-float32")
    assert "onnx-qdq-u8s8 was preferred" in choice.dropped["onnx-qdq-s8s8"]
    assert "0.600 against 0.300 ms" in choice.dropped["onnx-qdq-s8s8"]
    assert choice.latency == "measured on the exporting host"


def test_int8_that_is_slower_than_float_goes_and_the_figures_stay():
    choice = choose([*FLOATS, candidate("onnx-qdq-u8s8", ms=1.1)], resolved("native", VNNI), VNNI)
    assert choice.kept == ("onnx-float32", "tflite-float32")
    assert choice.dropped["onnx-qdq-u8s8"] == ("measured slower than float32: 1.100 ms a row, onnx-float32 1.000 ms")


def test_int8_that_is_as_slow_within_noise_stays_and_says_so():
    choice = choose([*FLOATS, candidate("onnx-qdq-u8s8", ms=1.02)], resolved("native", VNNI), VNNI)
    assert "onnx-qdq-u8s8" in choice.kept
    assert "no faster than float32 (1.020 ms a row" in choice.notes["onnx-qdq-u8s8"]


def test_the_float_of_another_format_is_the_measure_too():
    fast = [candidate("onnx-float32", ms=2.0), candidate("tflite-float32", ms=1.0)]
    choice = choose([*fast, candidate("onnx-qdq-u8s8", ms=1.5)], resolved("native", VNNI), VNNI)
    assert "onnx-qdq-u8s8" not in choice.kept


def test_what_only_stores_in_fewer_bits_stays_for_its_size_and_says_so():
    choice = choose([*FLOATS, candidate("onnx-weight-only", ms=1.5)], resolved("native", VNNI), VNNI)
    assert "onnx-weight-only" in choice.kept
    assert "kept for its size" in choice.notes["onnx-weight-only"]


def test_a_difference_that_a_twin_of_the_same_file_shows_too_decides_nothing():
    """Half as fast again, but the file measured twice differs by 60 %: size decides, and the note says so."""
    small = candidate("onnx-qdq-u8s8", ms=1.5, noise=0.6)
    choice = choose([*FLOATS, small], resolved("native", VNNI), VNNI)
    assert choice.kept[0] == "onnx-qdq-u8s8"
    assert "within noise, 60%" in choice.notes["onnx-qdq-u8s8"]
    large = dataclasses.replace(small, size_bytes=5000)
    choice = choose([*FLOATS, large], resolved("native", VNNI), VNNI)
    assert choice.kept == ("onnx-float32", "tflite-float32")
    reason = choice.dropped["onnx-qdq-u8s8"]
    assert "within noise" in reason and "no smaller (5000 bytes, onnx-float32 4000)" in reason
    quiet = dataclasses.replace(small, latency_noise=0.01)
    assert "measured slower" in choose([*FLOATS, quiet], resolved("native", VNNI), VNNI).dropped["onnx-qdq-u8s8"]


def test_among_quantized_forms_within_noise_accuracy_decides_and_the_reason_says_so():
    pair = [
        candidate("onnx-qdq-u8s8", ms=0.30, accuracy=0.90, noise=0.2),
        candidate("onnx-qdq-s8s8", ms=0.34, accuracy=0.95, noise=0.01),
    ]
    choice = choose([*FLOATS, *pair], resolved("native", VNNI), VNNI)
    assert choice.kept[0] == "onnx-qdq-s8s8"
    assert choice.dropped["onnx-qdq-u8s8"].endswith("0.300 against 0.340 ms, which is within noise")
    quiet = [dataclasses.replace(item, latency_noise=0.01) for item in pair]
    choice = choose([*FLOATS, *quiet], resolved("native", VNNI), VNNI)
    assert choice.kept[0] == "onnx-qdq-u8s8"
    assert "noise" not in choice.dropped["onnx-qdq-s8s8"]


def test_of_two_floats_within_noise_the_smaller_is_kept_first():
    pair = [candidate("onnx-float32", ms=1.0, size=4000, noise=0.3), candidate("tflite-float32", ms=1.2, size=3000)]
    assert choose(pair, resolved("native", VNNI), VNNI).kept == ("tflite-float32", "onnx-float32")


def test_of_equally_fast_ones_the_more_accurate_is_kept():
    pair = [candidate("onnx-qdq-u8s8", ms=0.300, accuracy=0.90), candidate("onnx-qdq-u8s8-pc", ms=0.305, accuracy=0.95)]
    choice = choose([*FLOATS, *pair], resolved("native", VNNI), VNNI)
    assert choice.kept[0] == "onnx-qdq-u8s8-pc"


# --- not measured


def test_elsewhere_latency_decides_nothing():
    """U8S8 is the fastest here, and slower variants stay: the board's own table and its install decide."""
    given_ = [
        *FLOATS,
        candidate("onnx-qdq-s8s8", ms=5.0),
        candidate("onnx-qdq-u8s8", ms=0.1),
        candidate("tflite-static", ms=9.0),
    ]
    choice = choose(given_, target_named("pi4"), VNNI)
    assert not choice.measured
    assert choice.latency == "unmeasured"
    assert choice.kept == ("onnx-qdq-s8s8", "tflite-static", "tflite-float32")
    assert "which is S8S8" in choice.dropped["onnx-qdq-u8s8"]
    assert " ms" not in "".join(choice.dropped.values())


def test_a_more_accurate_form_wins_then_integer_arithmetic_then_size():
    worse = candidate("onnx-qdq-s8s8-per-tensor", accuracy=0.91)
    better = candidate("onnx-qdq-s8s8-per-channel", accuracy=0.95, size=1100)
    dynamic = candidate("onnx-dynamic", accuracy=0.951, size=900)
    choice = choose([*FLOATS, worse, better, dynamic], target_named("pi5"), VNNI)
    assert choice.kept[0] == "onnx-qdq-s8s8-per-channel"


def test_a_target_with_one_engine_gets_its_format_alone():
    given_ = [*FLOATS, candidate("onnx-qdq-s8s8"), candidate("tflite-static"), candidate("tflite-dynamic")]
    choice = choose(given_, target_named("pi-32bit"), VNNI)
    assert choice.kept == ("tflite-static", "tflite-float32", "tflite-dynamic")
    assert choice.dropped["onnx-float32"] == "no engine of pi-32bit runs onnx"


def test_what_the_only_engine_of_a_target_misreads_is_out_of_the_question():
    given_ = [*FLOATS, candidate("tflite-dynamic-per-channel"), candidate("tflite-dynamic-per-tensor", accuracy=0.94)]
    choice = choose(given_, target_named("pi-32bit"), VNNI)
    assert choice.kept == ("tflite-dynamic-per-tensor", "tflite-float32")
    assert "misreads a scale a channel" in choice.dropped["tflite-dynamic-per-channel"]
    assert "tflite-dynamic-per-channel" in choose(given_, target_named("pi5"), VNNI).kept


def test_what_missed_a_gate_is_not_chosen():
    given_ = [*FLOATS, candidate("onnx-qdq-s8s8", missed="missed max_drop"), candidate("onnx-dynamic", accuracy=0.9)]
    choice = choose(given_, target_named("pi4"), VNNI)
    assert choice.dropped["onnx-qdq-s8s8"] == "missed max_drop"
    assert choice.kept[0] == "onnx-dynamic"


def test_nothing_quantized_keeps_the_floats():
    assert choose(FLOATS, target_named("pi4"), VNNI).kept == ("tflite-float32", "onnx-float32")


# --- always

FORMS = {
    "onnx": ("float32", "qdq-s8s8", "qdq-u8s8", "qoperator-u8s8", "dynamic", "float16", "weight-only"),
    "tflite": ("float32", "static", "static-float-io", "dynamic"),
}
names = st.sampled_from([f"{kind}-{form}" for kind, forms in FORMS.items() for form in forms])
latency = st.floats(0.01, 100.0)
candidates = st.lists(
    st.builds(
        candidate,
        names,
        ms=latency,
        accuracy=st.floats(0.0, 1.0),
        size=st.integers(1, 10**6),
        noise=st.sampled_from([0.0, 0.01, 0.5]),
        missed=st.sampled_from(["", "", "", "missed"]),
    ),
    unique_by=lambda item: item.name,
)


@given(candidates, st.sampled_from(sorted(TARGETS)), st.sampled_from([VNNI, PLAIN, PI5]))
def test_every_candidate_is_kept_or_has_a_reason(items, target, host):
    choice = choose(items, resolved(target, host), host)
    assert len(choice.kept) <= MOST
    assert len(set(choice.kept)) == len(choice.kept)
    assert set(choice.kept) | set(choice.dropped) == {item.name for item in items}
    assert not set(choice.kept) & set(choice.dropped)
    assert all(choice.dropped.values())
    assert set(choice.notes) <= set(choice.kept)
    json.dumps(choice.to_dict(), allow_nan=False)


@given(candidates, st.sampled_from(sorted(TARGETS)), st.sampled_from([VNNI, PLAIN, PI5]))
def test_nothing_measured_slower_than_float_is_kept_silently(items, target, host):
    choice = choose(items, resolved(target, host), host)
    if not choice.measured:
        return
    kept = [item for item in items if item.name in choice.kept]
    floats = [item for item in kept if item.family == "float"]
    fastest = min(floats, key=lambda item: item.latency_ms, default=None)
    for item in kept:
        if floats and item.family != "float" and item.latency_ms > fastest.latency_ms:
            assert item.name in choice.notes
            if item.family in ("static", "dynamic"):
                assert item.latency_ms <= fastest.latency_ms * (1 + noise_of(item, fastest))
                assert noise_of(item, fastest) >= LATENCY_NOISE


@given(candidates, st.sampled_from(["pi4", "pi-32bit"]))
def test_where_latency_is_not_measured_it_changes_nothing(items, target):
    without = [dataclasses.replace(item, latency_ms=None) for item in items]
    row = target_named(target)
    assert choose(items, row, VNNI) == choose(without, row, VNNI)


@given(candidates, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(items, random):
    shuffled = list(items)
    random.shuffle(shuffled)
    row = target_named("pi4")
    assert choose(items, row, VNNI).kept == choose(shuffled, row, VNNI).kept
