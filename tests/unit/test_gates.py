"""Gates are pure: figures in, results out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters import MaxDrop, MaxLatency, MaxMetric, MaxParityError, MaxSize, Metric, MinMetric
from outrider_exporters.gates import GATES, Figures, blame, check_gates, explain, gate_to_dict, gated_metric, judge
from outrider_exporters.job import check_latency_gates
from outrider_runtimes.board import Board
from outrider_runtimes.errors import ConfigError

share = st.floats(0.0, 1.0, allow_nan=False)


def figures(accuracy: float, *, name: str = "onnx-int8", size: int = 1000, steps: tuple = ()) -> Figures:
    return Figures(variant=name, metrics={"accuracy": accuracy}, size_bytes=size, steps=steps)


@given(baseline=share, reached=share, points=st.floats(0.0, 100.0))
def test_max_drop_passes_exactly_up_to_its_points(baseline, reached, points):
    (result,) = judge([MaxDrop("accuracy", points=points)], [figures(reached)], {"accuracy": baseline})
    drop = (baseline - reached) * 100.0
    assert result.figure == pytest.approx(drop)
    if abs(drop - points) > 1e-6:
        assert result.passed == (drop < points)


@pytest.mark.parametrize(("baseline", "reached"), [(0.97, 0.96), (0.5, 0.49), (0.3, 0.29), (1.0, 0.99)])
def test_a_drop_of_exactly_the_bound_passes(baseline, reached):
    (result,) = judge([MaxDrop("accuracy", points=1.0)], [figures(reached)], {"accuracy": baseline})
    assert result.passed


def test_a_gain_passes_and_blames_nothing():
    steps = (("baseline", {"accuracy": 0.9}), ("in onnx-int8", {"accuracy": 0.95}))
    (result,) = judge([MaxDrop("accuracy", points=0.0)], [figures(0.95, steps=steps)], {"accuracy": 0.9})
    assert result.passed
    assert not result.blame


@given(reached=share, at_least=share)
def test_min_metric_compares_as_it_says(reached, at_least):
    (result,) = judge([MinMetric("accuracy", at_least=at_least)], [figures(reached)], {"accuracy": 1.0})
    assert result.passed == (reached >= at_least)
    assert result.bound == at_least


@given(size=st.integers(1, 10**9), bound=st.integers(1, 10**9))
def test_max_size_counts_bytes(size, bound):
    (result,) = judge([MaxSize(bound)], [figures(0.9, size=size)], {"accuracy": 0.9})
    assert result.passed == (size <= bound)


def test_every_gate_judges_every_variant():
    variants = [figures(0.96, name="onnx-float32"), figures(0.90, name="onnx-int8")]
    results = judge([MaxDrop("accuracy", points=2.0), MaxSize(2000)], variants, {"accuracy": 0.97})
    assert [(r.gate["type"], r.variant, r.passed) for r in results] == [
        ("max_drop", "onnx-float32", True),
        ("max_drop", "onnx-int8", False),
        ("max_size", "onnx-float32", True),
        ("max_size", "onnx-int8", True),
    ]


def test_a_missed_gate_names_variant_figure_bound_and_the_step_that_lost_most():
    steps = (
        ("baseline", {"accuracy": 0.971}),
        ("after prune", {"accuracy": 0.969}),
        ("after distill", {"accuracy": 0.975}),
        ("in tflite-float32", {"accuracy": 0.975}),
        ("in tflite-int8", {"accuracy": 0.91}),
    )
    results = judge(
        [MaxDrop("accuracy", points=1.0)], [figures(0.91, name="tflite-int8", steps=steps)], {"accuracy": 0.971}
    )
    text = explain(results)
    assert "tflite-int8 missed max_drop" in text
    assert "0.9100" in text and "6.10 points" in text and "at most 1 " in text
    assert "most was lost in tflite-int8" in text
    assert "after prune 0.9690, after distill 0.9750" in text


def test_several_missed_gates_are_all_told():
    results = judge([MaxSize(10), MinMetric("accuracy", at_least=0.99)], [figures(0.9)], {"accuracy": 0.9})
    text = explain(results)
    assert "1000 bytes" in text
    assert "at least 0.99" in text


@given(st.lists(share, min_size=2, max_size=6))
def test_blame_finds_the_largest_loss(values):
    steps = [(f"s{i}", {"m": value}) for i, value in enumerate(values)]
    text = blame(steps, "m")
    losses = {f"s{i + 1}": before - after for i, (before, after) in enumerate(itertools.pairwise(values))}
    worst = max(losses.values())
    if worst > 0:
        named = text.split(";", maxsplit=1)[0].removeprefix("most was lost ")
        assert losses[named] == worst
    else:
        assert "most was lost" not in text


def test_blame_without_steps_says_nothing():
    assert blame([], "accuracy") == ""


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (MaxDrop("acuracy", points=1.0), "no metric 'acuracy'; evaluate gives accuracy"),
        (MinMetric("f1", at_least=0.5), "no metric 'f1'"),
        (MaxDrop("loss", points=1.0), "0..1"),
    ],
)
def test_gates_that_cannot_be_judged_are_refused_before_any_work(gate, words):
    baseline = {"accuracy": 0.9} if gate.metric != "loss" else {"accuracy": 0.9, "loss": 3.2}
    with pytest.raises(ConfigError, match=r"gates\[1\]") as caught:
        check_gates([MaxSize(100), gate], baseline)
    assert words in str(caught.value)


def test_what_is_not_a_gate_is_refused():
    with pytest.raises(ConfigError, match=r"gates\[0\] is a str"):
        check_gates(["accuracy"], {"accuracy": 0.9})  # type: ignore[list-item]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MaxDrop("accuracy", points=-1.0),
        lambda: MaxDrop("accuracy", points=math.nan),
        lambda: MaxDrop("accuracy", points=math.inf),
        lambda: MaxDrop("accuracy", points="1"),
        lambda: MinMetric("accuracy", at_least=-math.inf),
        lambda: MinMetric("accuracy", at_least=math.nan),
        lambda: MaxSize(0),
        lambda: MaxSize(True),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError, match=r"expected an? (number|integer)"):
        make()


def test_results_and_gates_are_json():
    results = judge([MaxDrop("accuracy", points=1.0), MaxSize(10)], [figures(0.5)], {"accuracy": 0.9})
    for result in results:
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["variant"] == "onnx-int8"
    assert gate_to_dict(MaxDrop("accuracy", points=1.0)) == {"type": "max_drop", "metric": "accuracy", "points": 1.0}
    kinds = {"max_drop", "min_metric", "max_metric", "max_size", "max_latency", "max_parity_error"}
    assert set(GATES) == kinds
    error = Metric("error", higher_is_better=False)
    stored = gate_to_dict(MaxDrop(error, points=1.0))
    assert stored["metric"] == {"name": "error", "higher_is_better": False}


ERROR = Metric("error", higher_is_better=False)


def errors(value, **options):
    return Figures(variant="onnx-int8", metrics={"error": value}, size_bytes=1, **options)


def test_a_rise_of_a_metric_of_which_lower_is_better_is_a_drop():
    risen, fallen = (judge([MaxDrop(ERROR, points=1.0)], [errors(v)], {"error": 0.10})[0] for v in (0.13, 0.05))
    assert not risen.passed
    assert risen.figure == pytest.approx(3.0)
    assert "3.00 points above" in risen.text
    assert fallen.passed
    assert "5.00 points below" in fallen.text


def test_blame_follows_the_direction():
    steps = (("baseline", {"error": 0.1}), ("after prune", {"error": 0.4}), ("in onnx-int8", {"error": 0.3}))
    assert blame(steps, ERROR).startswith("most was lost after prune")
    assert not blame(steps, "error").startswith("most was lost after prune")


@given(reached=share, at_most=share)
def test_max_metric_compares_as_it_says(reached, at_most):
    (result,) = judge([MaxMetric("error", at_most=at_most)], [errors(reached)], {"error": 0.5})
    assert result.passed == (reached <= at_most)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: MinMetric(ERROR, at_least=0.5), "MaxMetric"),
        (lambda: MaxMetric(Metric("accuracy"), at_most=0.5), "MinMetric"),
    ],
)
def test_a_bound_on_the_wrong_side_is_refused(make, hint):
    with pytest.raises(ConfigError, match="is better") as caught:
        make()
    assert hint in caught.value.hint


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_latency_and_parity_are_compared_with_their_bounds(figure, bound):
    measured = errors(0.1, latency_ms=figure, parity=figure)
    latency, parity = judge([MaxLatency(ms=bound), MaxParityError(share=bound)], [measured], {"error": 0.1})
    assert latency.passed == parity.passed == (figure <= bound)
    assert "on this host" in latency.text
    assert "of their range" in parity.text


def test_what_was_not_measured_meets_no_bound():
    for result in judge([MaxLatency(ms=1e9), MaxParityError(share=1e9)], [errors(0.1)], {"error": 0.1}):
        assert not result.passed


def test_the_gated_metric_has_its_direction():
    assert gated_metric([MaxSize(1), MaxDrop("accuracy", points=1.0)]) == Metric("accuracy")
    assert gated_metric([MaxMetric("error", at_most=1.0)]) == ERROR
    assert gated_metric([MaxDrop(ERROR, points=1.0), MinMetric("x", at_least=0)]) == ERROR
    assert gated_metric([MaxSize(1), MaxLatency(ms=1.0)]) is None


def test_layers_are_told_with_the_gate():
    (result,) = judge([MinMetric("accuracy", at_least=0.99)], [figures(0.9)], {"accuracy": 0.9})
    told = dataclasses.replace(result, layers="quantization error grows most in features.3 (Conv, +12.0%)")
    assert explain([told]).endswith("(quantization error grows most in features.3 (Conv, +12.0%))")


VNNI = Board(
    machine="x86_64",
    features=frozenset(["sse4_2", "avx", "avx2", "fma", "f16c", "avx512_vnni"]),
    cpus=1,
    memory_bytes=0,
    python="3.11.9",
)


@pytest.mark.parametrize("targets", [(), ("native",)])
def test_a_latency_is_bounded_where_this_host_speaks_for_the_target(targets):
    check_latency_gates([MaxLatency(ms=1.0)], targets, VNNI)


@pytest.mark.parametrize("targets", [("pi4",), ("native", "pi5"), ("x86-avx2",)])
def test_a_latency_is_refused_for_a_target_with_other_int8_instructions(targets):
    check_latency_gates([MaxSize(1)], targets, VNNI)
    with pytest.raises(ConfigError, match=rf"gates\[1\] \(max_latency\).*{targets[-1]}"):
        check_latency_gates([MaxSize(1), MaxLatency(ms=1.0)], targets, VNNI)
