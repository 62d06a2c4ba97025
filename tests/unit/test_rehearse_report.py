"""Verdicts, differences and the text of a rehearsal, from made-up events."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider.admit.supervise import Ended, Limits
from outrider_exporters.rehearse.report import (
    FATAL,
    Pair,
    Rehearsal,
    TargetReport,
    measured_tolerance,
    missing_operator,
    render,
    spread_of,
)
from outrider_exporters.rehearse.run import Heard, judged
from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import target_named

LIMITS = Limits(wall_s=30.0, rss_bytes=2**29)
NAMES = ("onnx-int8", "onnxruntime")
WELL = Ended(how="exit", code=0, peak_rss_bytes=1000, stderr="")


def ended(how, code=0, stderr=""):
    return Ended(how=how, code=code, peak_rss_bytes=1000, stderr=stderr)


def heard(*events):
    told = Heard()
    for event in events:
        told.take(event)
    return told


def answer(**changes):
    answered = {"agreement": 1.0, "max_error": {"y": 0.0}, "failure": "", "only_tolerance": False}
    return {"answered": {**answered, **changes}}


def verdict(end, *events):
    return judged(target_named("pi4"), NAMES, heard({"step": "golden"}, *events), end, LIMITS)


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (answer(), "right"),
        (answer(failure="differs", max_error={"y": 1.0}), "wrong"),
        (answer(failure="ONNX Runtime failed", max_error={}), "failed"),
        ({"refused": "no"}, "refused"),
        ({"absent": "not installed"}, "absent"),
    ],
)
def test_the_verdict_of_one_that_ended_well(event, wanted):
    pair = verdict(WELL, event)
    assert pair.verdict == wanted
    assert (pair.variant, pair.engine, pair.peak_rss_bytes) == (*NAMES, 1000)
    assert bool(pair.detail) == (wanted != "right")


@pytest.mark.parametrize(
    ("end", "wanted", "words"),
    [
        (ended("signal", signal.SIGILL), "illegal", "SIGILL: it used an instruction that cortex-a72 does not have"),
        (ended("signal", signal.SIGSEGV), "crashed", "SIGSEGV"),
        (ended("signal", 63), "crashed", "signal 63"),
        (ended("signal", signal.SIGALRM), "hung", "within 30 s"),
        (ended("wall"), "hung", "within 30 s"),
        (ended("memory"), "memory", "512 MiB"),
        (ended("exit", 1, "Traceback\nMemoryError"), "crashed", "MemoryError"),
        (ended("output"), "crashed", "protocol"),
    ],
)
def test_the_verdict_of_one_that_did_not(end, wanted, words):
    pair = verdict(end)
    assert pair.verdict == wanted
    assert "answering on onnxruntime" in pair.detail and words in pair.detail


def test_the_engine_is_named_where_it_dies_on_import():
    pair = judged(target_named("pi3"), NAMES, heard({"step": "import"}), ended("signal", signal.SIGILL), LIMITS)
    assert pair.detail.startswith("importing onnxruntime, it was killed by SIGILL")
    assert "cortex-a53" in pair.detail


def test_a_child_that_ends_without_an_answer_crashed():
    assert verdict(WELL).verdict == "crashed"


def test_a_python_that_does_not_start_is_no_fault_of_the_bundles():
    with pytest.raises(RehearsalError, match=r"pi4.*cannot execute"):
        judged(target_named("pi4"), NAMES, heard(), ended("exit", 126, "cannot execute"), LIMITS)


@pytest.mark.parametrize(
    ("reason", "operator"),
    [
        ("NOT_IMPLEMENTED : Could not find an implementation for Softsign(1) node with name ''", "Softsign(1)"),
        ("Fatal error: com.microsoft:Gelu2(-1) is not a registered function/op", "Gelu2(-1)"),
        ("Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An older", "FULLY_CONNECTED version 12"),
        ("Encountered unresolved custom op: MyOp.See instructions", "MyOp.See"),
        ("cut short", ""),
    ],
)
def test_the_operator_that_an_engine_lacks(reason, operator):
    assert missing_operator(reason) == operator
    pair = verdict(WELL, {"refused": reason})
    assert pair.missing_operator == operator
    assert reason in pair.detail


def test_the_spread_is_the_largest_difference_of_any_two():
    a, b, c = (np.array([[v, 0.0]], np.float32) for v in (1.0, 4.0, -2.0))
    assert spread_of([[a, a], [b, a], [c, b]]) == [6.0, 3.0]


def test_what_cannot_be_compared_has_no_spread():
    one = np.ones(2, np.float32)
    assert spread_of([[one], [np.array([1.0, np.nan], np.float32)]]) == [None]
    assert spread_of([[one], [np.ones(3, np.float32)]]) == [None]
    assert spread_of([[np.zeros((0, 3))], [np.zeros((0, 3))]]) == [0.0]


finite = hnp.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(st.lists(finite, min_size=2, max_size=4))
def test_the_spread_equals_the_largest_of_all_pairs(arrays):
    pairs = [np.abs(a.astype(np.float64) - b.astype(np.float64)).max() for a in arrays for b in arrays]
    assert spread_of([[array] for array in arrays]) == [max(pairs)]


def target(name, *pairs, emulated=True):
    return TargetReport(target=name, cpu="cortex-a72", emulated=emulated, board={}, pairs=pairs)


def rehearsal(*targets, spread=None):
    return Rehearsal(path="b", name="n", version=1, digest="d", targets=targets, spread=spread or {})


RIGHT = Pair(variant="v", engine="e", verdict="right", agreement=1.0, max_error={"y": 1e-6}, peak_rss_bytes=10**8)


def test_a_target_passes_when_something_answers_right_and_nothing_is_fatal():
    assert target("pi4", RIGHT).passed
    refused = dataclasses.replace(RIGHT, verdict="refused")
    assert target("pi4", RIGHT, refused, dataclasses.replace(RIGHT, verdict="absent")).passed
    assert not target("pi4", refused).passed
    assert not target("pi4").passed
    for fatal in FATAL:
        assert not target("pi4", RIGHT, dataclasses.replace(RIGHT, verdict=fatal)).passed
    assert not rehearsal(target("pi4", RIGHT), target("pi5")).passed


def test_the_measured_tolerance_is_the_worst_of_all_targets():
    worse = dataclasses.replace(RIGHT, max_error={"y": 3e-6})
    other = dataclasses.replace(RIGHT, variant="w", max_error={"y": 0.0})
    refused = dataclasses.replace(RIGHT, variant="x", verdict="refused", max_error={})
    found = measured_tolerance([target("pi4", RIGHT, other), target("pi5", worse, refused)])
    assert found == {"v": {"y": 3e-6}, "w": {"y": 0.0}}


def test_the_text_says_all_and_gives_no_time():
    wrong = Pair(variant="w", engine="e", verdict="wrong", detail="differs by 3", max_error={"y": None}, agreement=0.5)
    absent = Pair(variant="v", engine="f", verdict="absent", detail="not installed")
    again = dataclasses.replace(absent, variant="w")
    found = rehearsal(target("pi4", RIGHT, wrong, absent, again), target("pi5"), spread={"v": {"y": 0.5, "z": None}})
    text = render(json.loads(json.dumps({**found.to_dict(), "written": None})))
    row = next(line for line in text.splitlines() if line.startswith("pi4  ") and " v " in line).split()
    assert row[:7] == ["pi4", "cortex-a72", "v", "e", "right", "100.0%", "1e-06"]
    assert "pi4: w on e: differs by 3" in text
    assert text.count("not installed") == 1
    assert "pi5: no variant runs on any engine of it" in text
    assert "not comparable" in text and "not finite" in text
    assert "times under an emulator mean nothing" in text
    assert "the emulator's process" in text


def test_no_emulator_no_note_on_it():
    found = rehearsal(target("native", RIGHT, emulated=False))
    assert "emulator" not in render({**found.to_dict(), "written": None})


def test_the_text_says_what_was_written_and_that_old_signatures_do_not_hold():
    written = {"path": "o", "digest": "dd", "tolerance": {"v": {"y": 2e-6}}, "signatures": 0, "dropped_signatures": 2}
    text = render({**rehearsal(target("pi4", RIGHT)).to_dict(), "written": written})
    assert "wrote o, digest dd, not signed; 2 signatures of the old one do not hold for it" in text
    assert "v y 2e-06" in text
    signed = render({**rehearsal(target("pi4", RIGHT)).to_dict(), "written": {**written, "signatures": 1}})
    assert "signed anew" in signed
