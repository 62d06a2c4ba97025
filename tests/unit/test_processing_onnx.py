"""Suppression beside ONNX Runtime's own operator, which is another implementation of the same rule."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from outrider_runtimes.processing import Suppression
from support.steps import run

ROWS, BOXES, KINDS = 3, 60, 4
MOST = 1000


@pytest.fixture(scope="module")
def operator():
    """`NonMaxSuppression` as ONNX Runtime runs it, with nothing fixed."""
    kinds = [
        ("boxes", TensorProto.FLOAT, ["N", "P", 4]),
        ("scores", TensorProto.FLOAT, ["N", "C", "P"]),
        ("most", TensorProto.INT64, [1]),
        ("iou", TensorProto.FLOAT, [1]),
        ("score", TensorProto.FLOAT, [1]),
    ]
    inputs = [helper.make_tensor_value_info(*kind) for kind in kinds]
    node = helper.make_node("NonMaxSuppression", [name for name, _, _ in kinds], ["selected"])
    output = helper.make_tensor_value_info("selected", TensorProto.INT64, ["K", 3])
    graph = helper.make_graph([node], "suppression", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def selected(operator, boxes, scores, step):
    """By row: what the operator keeps, as (score, box, class), best first, cut to the most of all classes together.

    The operator knows each class by itself and no other way. Without classes it is given each pair of box and class as
    a box of one class; for a box's best class alone the scores of the others are far below every threshold.
    """
    if not step.multi_label:
        best = np.arange(scores.shape[2]) == scores.argmax(2)[..., np.newaxis]
        scores = np.where(best, scores, np.float32(-1.0))
    rows, count, kinds = scores.shape
    by_class = scores.transpose(0, 2, 1)
    if not step.class_aware:
        boxes, by_class = boxes.repeat(kinds, axis=1), scores.reshape(rows, 1, count * kinds)
    numbers = operator.run(
        None,
        {
            "boxes": boxes,
            "scores": np.ascontiguousarray(by_class),
            "most": np.array([boxes.shape[1]]),
            "iou": np.float32([step.iou_threshold]),
            "score": np.float32([step.score_threshold]),
        },
    )[0]
    kept = [[] for _ in range(rows)]
    for row, its_kind, number in numbers.tolist():
        box, kind = (number, its_kind) if step.class_aware else divmod(number, kinds)
        kept[row].append((-scores[row, box, kind], box, kind))
    return [sorted(each)[: step.max_detections] for each in kept]


def agree(operator, boxes, scores, step):
    """Compare all rows; gives how many detections there were."""
    made = run(step, {"boxes": boxes, "scores": scores}, {"boxes": "NPB", "scores": "NPC"})
    wanted = selected(operator, boxes, scores, step)
    assert made["count"].tolist() == [len(each) for each in wanted]
    for row, each in enumerate(wanted):
        count = len(each)
        assert made["classes"][row, :count].tolist() == [kind for _, _, kind in each]
        np.testing.assert_array_equal(made["scores"][row, :count], np.float32([-score for score, _, _ in each]))
        corners = boxes[row, [box for _, box, _ in each]] if each else np.empty((0, 4), np.float32)
        np.testing.assert_array_equal(made["boxes"][row, :count], corners)
    return int(made["count"].sum())


def scattered(rng):
    """Boxes of any size and place, and scores no two of which are level."""
    first = rng.uniform(0, 60, (ROWS, BOXES, 2))
    boxes = np.concatenate([first, first + rng.uniform(1, 40, (ROWS, BOXES, 2))], -1).astype(np.float32)
    return boxes, rng.uniform(0, 1, (ROWS, BOXES, KINDS)).astype(np.float32)


def level(rng):
    """Whole corners close together, some boxes without an area, and scores of few values: ties and exact bounds."""
    first = rng.integers(0, 12, (ROWS, BOXES, 2))
    boxes = np.concatenate([first, first + rng.integers(0, 9, (ROWS, BOXES, 2))], -1).astype(np.float32)
    return boxes, (rng.integers(0, 11, (ROWS, BOXES, KINDS)) / 10).astype(np.float32)


@pytest.mark.parametrize("class_aware", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("draw", [scattered, level])
def test_suppression_keeps_what_onnx_runtimes_operator_keeps(operator, draw, class_aware, multi_label):
    found = 0
    for seed in range(3):
        for iou, score, most in ((0.5, 0.05, MOST), (0.25, 0.5, MOST), (0.0, 0.0, 5), (1.0, 0.5, 17)):
            step = Suppression(
                iou_threshold=iou,
                score_threshold=score,
                max_detections=most,
                candidates=10_000,
                class_aware=class_aware,
                multi_label=multi_label,
            )
            found += agree(operator, *draw(np.random.default_rng(seed)), step)
    assert found > 300


def test_where_nothing_is_found_both_say_so(operator):
    boxes, scores = level(np.random.default_rng(1))
    assert agree(operator, boxes, scores, Suppression(score_threshold=1.0)) == 0  # a score at the bound is nothing
    assert agree(operator, boxes, np.zeros_like(scores), Suppression(score_threshold=0.0)) == 0
    assert agree(operator, boxes[:, :1], scores[:, :1] + 1, Suppression(max_detections=1)) == ROWS
