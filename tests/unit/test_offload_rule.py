"""The key ``offload`` of a manifest, and what the report says of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.bundle.offload import OffloadRule, parse_offload
from outrider_exporters import Data, Offload
from outrider_exporters.offload import check_offload, not_the_class, score_of
from outrider_exporters.report.offload import offload_section
from outrider_runtimes.errors import ConfigError, ExportError, FormatError
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Interface, TensorSpec

INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 2), axes="NC"),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 3), axes="NC"),),
)
VARIANTS = ["onnx-float32", "onnx-int8"]
RULE = OffloadRule(
    score=Score(output="logits"),
    alpha=0.01,
    delta=0.1,
    rows=2000,
    thresholds={"onnx-float32": 0.4, "onnx-int8": 0.5},
    measured={"onnx-int8": {"chosen": {}}},
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.floats(0.001, 0.9), st.integers(1, 10**6), numbers, numbers)
def test_a_rule_comes_back_from_json(alpha, rows, first, second):
    rule = OffloadRule(
        score=Score(kind="energy", output="logits"),
        alpha=alpha,
        delta=0.5,
        rows=rows,
        thresholds=dict(zip(VARIANTS, (first, second), strict=True)),
    )
    assert parse_offload(json.loads(json.dumps(rule.to_dict())), INTERFACE, VARIANTS) == rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": {"kind": "margin", "output": "scores", "values": "logits"}}, "there is no output 'scores'"),
        ({"score": None}, "score: expected an object"),
        ({"thresholds": {"onnx-int8": 0.5}}, "thresholds are of"),
        ({"thresholds": {"onnx-float32": 0.4, "onnx-int8": "half"}}, "onnx-int8 is 'half', expected a number"),
        ({"thresholds": {"onnx-float32": 0.4, "onnx-int8": True}}, "onnx-int8 is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"delta": 1.5}, "delta is 1.5"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": 1.0}, "rows is 1.0"),
        ({"measured": []}, "measured: expected an object"),
    ],
)
def test_what_a_manifest_may_not_say(changes, message):
    with pytest.raises(FormatError, match=message):
        parse_offload({**RULE.to_dict(), **changes}, INTERFACE, VARIANTS)


def test_the_only_output_need_not_be_named():
    assert score_of(Offload(), INTERFACE) == Score(output="logits")
    two = Interface(
        inputs=INTERFACE.inputs,
        outputs=(*INTERFACE.outputs, TensorSpec(name="box", dtype="float32", shape=(None, 4), axes="NC")),
    )
    with pytest.raises(ConfigError, match=r"offload.output is not given"):
        score_of(Offload(), two)
    assert score_of(Offload(output="logits", score="entropy"), two).kind == "entropy"


@pytest.mark.parametrize("options", [{"alpha": "0.1"}, {"alpha": True}, {"delta": None}, {"output": 3}])
def test_values_of_another_type_are_refused_where_they_are_made(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*, expected a"):
        Offload(**options)


def test_the_parts_that_it_needs():
    x = {"x": np.zeros((230, 2), np.float32)}
    labels = np.zeros(230, np.int64)
    check_offload(Offload(), Data(certification=(x, labels), calibration=x, test=1), INTERFACE)
    for data, missing in (
        (Data(calibration=x, test=1), "data.certification"),
        (Data(certification=(x, labels), test=1), "data.calibration"),
        (Data(certification=(x, labels[:3]), calibration=x, test=1), "230 rows of inputs and 3 targets"),
        (Data(certification=x, calibration=x, test=1), "data.certification is not a pair"),
    ):
        with pytest.raises(ConfigError, match=missing):
            check_offload(Offload(), data, INTERFACE)


@pytest.mark.parametrize(("alpha", "rows"), [(0.01, 230), (0.05, 45)])
def test_too_few_rows_are_refused_before_any_work_with_their_number(alpha, rows):
    def check(count):
        x = {"x": np.zeros((count, 2), np.float32)}
        labels = np.zeros(count, np.int64)
        check_offload(Offload(alpha=alpha), Data(certification=(x, labels), calibration=x, test=1), INTERFACE)

    check(rows)
    with pytest.raises(ExportError, match=rf"offload: {rows - 1} calibration rows cannot certify .*it takes {rows}"):
        check(rows - 1)


def test_an_answer_is_wrong_where_any_of_its_places_is():
    wrong = not_the_class(Score(output="y"))
    logits = np.array([[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, 0.0]]])
    assert list(wrong({"y": logits}, np.array([[0, 1], [0, 1]]))) == [False, True]
    assert list(wrong({"y": logits[:, 0]}, np.array([0, 1]))) == [False, True]
    for targets in (np.array([0.0, 1.0]), np.array([[0, 1]])):
        with pytest.raises(ConfigError, match="the answers' classes"):
            wrong({"y": logits[:, 0]}, targets)


def test_the_report_has_a_curve_for_each_variant_and_nothing_without_a_rule():
    assert offload_section({"offload": {}}) == ""
    point = {"threshold": 0.4, "offloaded": 0.2, "accuracy_kept": 0.995, "accuracy_together": 0.98}
    measured = {"chosen": point, "curve": [{**point, "offloaded": 0.9}, point]}
    rule = {**RULE.to_dict(), "measured": {"onnx-int8": measured}}
    page = offload_section({"offload": rule})
    assert page.count("<svg") == 1
    assert "at most 1.00% of the kept answers are wrong" in page
    assert "20.0%" in page
    assert "98.00%" in page
