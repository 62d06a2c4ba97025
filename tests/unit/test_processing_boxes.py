"""Boxes decoded, thinned and brought to the caller's picture; references are loops over boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing import (
    AnchorBoxes,
    BoxesToImage,
    CornerBoxes,
    GridBoxes,
    Letterbox,
    Suppression,
    suppression,
)
from support.effort import effort
from support.steps import run, spec_of

AXES = {"boxes": "NPB", "scores": "NPC"}


def raw_boxes(rows, count, seed=0, spread=1.0):
    return (spread * np.random.default_rng(seed).standard_normal((rows, count, 4))).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- decoding


@settings(max_examples=effort(40), deadline=None)
@given(
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    strides=st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=3, unique=True),
    form=st.sampled_from(["ltrb", "cxcywh"]),
    offsets=st.sampled_from(["linear", "sigmoid"]),
    sides=st.sampled_from(["linear", "exp"]),
)
def test_a_grid_is_decoded_cell_by_cell(height, width, strides, form, offsets, sides):
    offsets = "linear" if form == "ltrb" else offsets
    step = GridBoxes(
        tensor="boxes",
        height=height,
        width=width,
        strides=strides,
        form=form,
        offsets=offsets,
        sides=sides,
        side_scale=1.5,
    )
    cells = [
        (stride, row, column)
        for stride in strides
        for row in range(math.ceil(height / stride))
        for column in range(math.ceil(width / stride))
    ]
    raw = raw_boxes(2, len(cells), seed=height)
    made = run(step, {"boxes": raw}, {"boxes": "NPB"})["boxes"]
    for boxes, values in zip(made, raw.tolist(), strict=True):
        for box, (a, b, c, d), (stride, row, column) in zip(boxes, values, cells, strict=True):
            side = [(math.exp(v) if sides == "exp" else v) * stride * 1.5 for v in (a, b, c, d)]
            if form == "ltrb":
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                wanted = [x - side[0], y - side[1], x + side[2], y + side[3]]
            else:
                move = sigmoid if offsets == "sigmoid" else float
                x, y = (column + move(a)) * stride, (row + move(b)) * stride
                wanted = [x - side[2] / 2, y - side[3] / 2, x + side[2] / 2, y + side[3] / 2]
            np.testing.assert_allclose(box, wanted, rtol=1e-4, atol=1e-3)


def test_a_huge_exponent_does_not_overflow():
    step = GridBoxes(tensor="boxes", height=8, width=8, strides=[8], form="ltrb", sides="exp")
    made = step.apply({"boxes": np.full((1, 1, 4), 1e30, np.float32)}, {})["boxes"]
    assert np.isfinite(made).all()
    anchored = AnchorBoxes(tensor="boxes", anchors=[[0.0, 0.0, 8.0, 8.0]])
    assert np.isfinite(anchored.apply({"boxes": np.full((1, 1, 4), 1e30, np.float32)}, {})["boxes"]).all()


@pytest.mark.parametrize("order", ["xywh", "yxhw"])
def test_anchors_are_decoded_as_in_ssd(order):
    rng = np.random.default_rng(3)
    anchors = np.concatenate([rng.uniform(0, 90, (7, 2)), rng.uniform(5, 40, (7, 2))], 1).astype(np.float32)
    raw = raw_boxes(3, 7)
    step = AnchorBoxes(tensor="boxes", anchors=anchors.tolist(), order=order)
    made = run(step, {"boxes": raw}, {"boxes": "NPB"})["boxes"]
    for boxes, values in zip(made, raw.tolist(), strict=True):
        for box, (a, b, c, d), (x, y, w, h) in zip(boxes, values, anchors.tolist(), strict=True):
            dx, dy, dw, dh = (a, b, c, d) if order == "xywh" else (b, a, d, c)
            middle = x + 0.1 * dx * w, y + 0.1 * dy * h
            half = math.exp(0.2 * dw) * w / 2, math.exp(0.2 * dh) * h / 2
            wanted = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
            np.testing.assert_allclose(box, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("form", "raw", "wanted"),
    [
        ("xyxy", [1, 2, 6, 6], [1, 4, 6, 12]),
        ("yxyx", [1, 2, 4.5, 8], [2, 2, 8, 9]),
        ("cxcywh", [1, 2, 6, 6], [-2, -2, 4, 10]),
        ("xywh", [1, 2, 6, 6], [1, 4, 7, 16]),
    ],
)
def test_other_forms_become_corners(form, raw, wanted):
    step = CornerBoxes(tensor="boxes", form=form, y_scale=2.0)
    made = run(step, {"boxes": np.array([[raw]], np.float32)}, {"boxes": "NPB"})["boxes"]
    np.testing.assert_allclose(made[0, 0], wanted)


def test_boxes_of_another_number_are_refused():
    step = GridBoxes(tensor="boxes", height=32, width=48, strides=[8], form="ltrb")
    with pytest.raises(FormatError, match=r"'boxes' has shape \[None, 23, 4\].*expected \[N, 24, 4\]"):
        step.specs({"boxes": spec_of("boxes", raw_boxes(1, 23), "NPB")}, {})
    with pytest.raises(FormatError, match=r"expected \[N, 1, 4\]"):
        AnchorBoxes(tensor="boxes", anchors=[[1, 1, 1, 1]]).specs(
            {"boxes": spec_of("boxes", raw_boxes(1, 2), "NPB")}, {}
        )
    with pytest.raises(FormatError, match="axes ''"):
        CornerBoxes(tensor="boxes", form="xyxy").specs({"boxes": spec_of("boxes", raw_boxes(1, 2))}, {})


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"strides": [1], "height": 512, "width": 512}, "strides: more than 131072 cells"),
        ({"strides": [0]}, "strides: expected a whole number"),
        ({"strides": []}, "strides: expected a list of 1 to 16"),
        ({"strides": [8, True]}, "strides: expected a whole number"),
        ({"offsets": "sigmoid"}, "offsets: sigmoid has no meaning for ltrb"),
        ({"side_scale": math.inf}, "side_scale: expected"),
    ],
)
def test_a_grid_refuses_hostile_keys(keys, match):
    with pytest.raises(FormatError, match=match):
        GridBoxes(**{"tensor": "boxes", "height": 32, "width": 32, "strides": [8], "form": "ltrb", **keys})


@pytest.mark.parametrize("anchor", [[1, 1, 0, 1], [1, 1, 1], [1, 1, 1, math.nan], "abcd"])
def test_an_anchor_is_four_numbers_with_an_area(anchor):
    with pytest.raises(FormatError, match="anchors: "):
        AnchorBoxes(tensor="boxes", anchors=[anchor])


# --- suppression


def plain_suppression(boxes, scores, step):
    """One row, in the plainest way: every pair of box and class, best first, against all that were kept."""
    scores = scores[:, step.first_class :]
    pairs = []
    for box, row in enumerate(scores):
        for kind, score in enumerate(row):
            best = step.multi_label or kind == int(np.argmax(row))
            if score > step.score_threshold and best and np.isfinite(boxes[box]).all():
                pairs.append((-score, box, kind))
    kept = []
    for _, box, kind in sorted(pairs)[: step.candidates]:
        alike = [other for other, its_kind in kept if its_kind == kind or not step.class_aware]
        if len(kept) < step.max_detections and not any(iou(boxes[box], boxes[o]) > step.iou_threshold for o in alike):
            kept.append((box, kind))
    return kept


def iou(one, other):
    """torchvision.ops.box_iou: intersection over union of two boxes of corners; 0 where the union is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
    return float(shared) / float(union) if union > 0 else 0.0


def crowd(rng, rows, count, kinds):
    """Boxes with whole corners, close together, and scores of few values: much is level and touches a bound exactly."""
    first = rng.integers(0, 12, (rows, count, 2))
    boxes = np.concatenate([first, first + rng.integers(0, 9, (rows, count, 2))], -1).astype(np.float32)
    return boxes, (rng.integers(0, 11, (rows, count, kinds)) / 10).astype(np.float32)


@settings(max_examples=effort(150), deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(0, 3),
    count=st.integers(1, 40),
    kinds=st.integers(2, 4),
    bounds=st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 0.75])),
    most=st.sampled_from([1, 3, 20, 100]),
    candidates=st.sampled_from([1, 7, 1000]),
    first_class=st.integers(0, 1),
    class_aware=st.booleans(),
    multi_label=st.booleans(),
)
def test_suppression_is_the_plain_rule(
    seed, rows, count, kinds, bounds, most, candidates, first_class, class_aware, multi_label
):
    boxes, scores = crowd(np.random.default_rng(seed), rows, count, kinds)
    step = Suppression(
        iou_threshold=bounds[0],
        score_threshold=bounds[1],
        max_detections=most,
        candidates=candidates,
        first_class=first_class,
        class_aware=class_aware,
        multi_label=multi_label,
    )
    made = run(step, {"boxes": boxes, "scores": scores}, AXES)
    assert list(made) == ["boxes", "scores", "classes", "count"]
    for row in range(rows):
        wanted = plain_suppression(boxes[row], scores[row], step)
        count_here = made["count"][row]
        assert count_here == len(wanted)
        assert made["classes"][row, :count_here].tolist() == [kind for _, kind in wanted]
        np.testing.assert_array_equal(
            made["boxes"][row, :count_here], [boxes[row, box] for box, _ in wanted] or np.empty((0, 4))
        )
        np.testing.assert_array_equal(
            made["scores"][row, :count_here], [scores[row, box, kind + first_class] for box, kind in wanted]
        )
        assert (made["classes"][row, count_here:] == -1).all()
        assert not made["boxes"][row, count_here:].any() and not made["scores"][row, count_here:].any()


def test_several_blocks_give_what_one_gives(monkeypatch):
    boxes, scores = crowd(np.random.default_rng(8), 2, 300, 3)
    step = Suppression(max_detections=1000, score_threshold=0.0, candidates=10_000)
    blocks = step.apply({"boxes": boxes, "scores": scores}, {})
    monkeypatch.setattr(suppression, "BLOCK", 10_000)
    whole = step.apply({"boxes": boxes, "scores": scores}, {})
    for name, array in whole.items():
        np.testing.assert_array_equal(array, blocks[name])
    wanted = plain_suppression(boxes[0], scores[0], step)
    assert whole["classes"][0, : whole["count"][0]].tolist() == [kind for _, kind in wanted]


def test_boxes_and_scores_that_are_no_numbers_are_dropped():
    boxes = np.array([[[0, 0, 4, 4], [np.nan, 0, 4, 4], [0, 0, np.inf, 4], [20, 20, 30, 30]]], np.float32)
    scores = np.array([[[0.5], [0.9], [0.8], [np.nan]]], np.float32)
    made = Suppression(max_detections=4).apply({"boxes": boxes, "scores": scores}, {})
    assert made["count"].tolist() == [1]
    np.testing.assert_array_equal(made["boxes"][0, 0], [0, 0, 4, 4])


def test_other_tensors_stay_and_names_are_as_asked():
    boxes, scores = crowd(np.random.default_rng(0), 1, 5, 2)
    extra = np.zeros((1, 2), np.float32)
    step = Suppression(scores="odds", classes="kinds", count="found", max_detections=3)
    made = run(
        step,
        {"a": extra, "boxes": boxes, "odds": scores, "z": extra},
        {"a": "NC", "z": "NC", "boxes": "NPB", "odds": "NPC"},
    )
    assert list(made) == ["a", "boxes", "odds", "kinds", "found", "z"]


def test_suppression_refuses_scores_of_other_boxes():
    boxes, scores = crowd(np.random.default_rng(0), 1, 5, 1)
    specs = {"boxes": spec_of("boxes", boxes, "NPB"), "scores": spec_of("scores", scores[:, :4], "NPC")}
    with pytest.raises(FormatError, match=r"'scores' has shape \[None, 4, 1\], expected \[N, 5, more than 0\]"):
        Suppression().specs(specs, {})
    with pytest.raises(FormatError, match="more than 1"):
        Suppression(first_class=1).specs({**specs, "scores": spec_of("scores", scores, "NPC")}, {})
    with pytest.raises(FormatError, match="max_detections: expected a whole number of 1 to 1000"):
        Suppression(max_detections=1001)


# --- back to the caller's picture


@settings(max_examples=effort(60), deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["letterbox", "stretch"]),
    st.sampled_from(["NHWC", "NCHW"]),
)
def test_the_corners_of_the_picture_come_back_as_its_corners(height, width, fit, axes):
    from outrider_runtimes.processing.geometry import placed

    place = placed((height, width), (64, 96), fit)
    whole = [place.left, place.top, place.left + place.width, place.top + place.height]
    middle = [place.left + place.width / 4, place.top, place.left + place.width, place.top + place.height / 2]
    boxes = np.array([[whole, [-9, -9, 200, 200], middle, [0, 0, 0, 0]]], np.float32)
    shape = {"N": 1, "H": height, "W": width, "C": 3}
    callers = {"image": np.zeros([shape[letter] for letter in axes], np.uint8)}
    step = BoxesToImage(tensor="boxes", image="image", height=64, width=96, axes=axes, fit=fit)
    made = run(step, {"boxes": boxes}, {"boxes": "NKB"}, callers=callers)["boxes"][0]
    edges = [0, 0, width, height]
    wanted = [edges, edges, [width / 4, 0, width, height / 2], [0, 0, 0, 0]]
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-3)


def test_a_bright_square_is_found_again_where_it_was():
    image = np.zeros((1, 90, 160, 1), np.uint8)
    image[0, 30:60, 40:100] = 255
    boxed = Letterbox(tensor="image", height=80, width=80, fill=0).apply({"image": image}, {})["image"][0, ..., 0]
    rows, columns = np.flatnonzero((boxed > 127).any(1)), np.flatnonzero((boxed > 127).any(0))
    found = np.array([[[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]], np.float32)
    step = BoxesToImage(tensor="boxes", image="image", height=80, width=80)
    made = step.apply({"boxes": found}, {"image": image.shape})["boxes"][0, 0]
    np.testing.assert_allclose(made, [40, 30, 100, 60], atol=2)  # a pixel of the network's is two of the picture's


def test_the_picture_must_be_one_that_the_caller_passes():
    step = BoxesToImage(tensor="boxes", image="photo", height=8, width=8)
    specs = {"boxes": spec_of("boxes", raw_boxes(1, 2), "NKB")}
    with pytest.raises(FormatError, match="the caller passes no 'photo'"):
        step.specs(specs, {"image": (None, 4, 4, 3)})
    with pytest.raises(ShapeError, match="it is empty"):
        step.apply({"boxes": raw_boxes(1, 2)}, {"photo": (1, 0, 4, 3)})
