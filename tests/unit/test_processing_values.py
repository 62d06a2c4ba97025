"""Cast, quantize, rename; softmax, sigmoid, top-k, argmax, masks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes.errors import FormatError, NotFiniteError, ShapeError
from outrider_runtimes.processing import (
    Argmax,
    Cast,
    Dequantize,
    Letterbox,
    MaskArgmax,
    Quantize,
    Rename,
    Sigmoid,
    Softmax,
    TopK,
)
from outrider_runtimes.tensors import DTYPES, TensorSpec
from support.effort import effort
from support.steps import run, spec_of

NUMBERS = sorted(DTYPES - {"bool"})
REALS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=st.floats(-50, 50, width=32)
)


def letters(array):
    return "NCXY"[: array.ndim]


# --- cast


def nearest_value(value, dtype):
    """Of one number, in Python's own arithmetic."""
    if dtype.startswith("float"):
        limits = np.finfo(dtype)
        return min(max(value, float(limits.min)), float(limits.max)) if abs(value) != np.inf else value
    limits = np.iinfo(dtype)
    if value in (np.inf, -np.inf):
        return limits.max if value > 0 else limits.min
    return min(max(round(value), int(limits.min)), int(limits.max))


EXTREMES = [0, 1, -1, 127, 128, -129, 255, 256, 2**15, -(2**31) - 1, 2**31, 2**53, 2**62]


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("source", NUMBERS)
def test_a_cast_clips_to_what_the_dtype_holds(source, dtype):
    extremes = [*EXTREMES, 0.5, 1.5, -0.5, -2.5, 1e30, -1e30, 6e4, -7e4] if source.startswith("float") else EXTREMES
    limits = np.finfo(source) if source.startswith("float") else np.iinfo(source)
    least, most = (limits.min.item(), limits.max.item()) if source.startswith("float") else (limits.min, limits.max)
    x = np.array([[*(value for value in extremes if least <= value <= most), least, most]], source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = run(Cast(tensor="x", dtype=dtype), {"x": x}, {"x": "NC"})["x"]
    wanted = np.array([[nearest_value(value, dtype) for value in x[0].tolist()]], dtype)
    np.testing.assert_array_equal(made, wanted)


def test_infinity_is_clipped_to_an_integer_and_nan_is_refused_by_name():
    x = np.array([[np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(Cast(tensor="x", dtype="int8").apply({"x": x}, {})["x"], [[127, -128]])
    with pytest.raises(NotFiniteError, match="'x' has NaN, which has no value as int8") as caught:
        Cast(tensor="x", dtype="int8").apply({"x": np.array([[np.nan]], np.float32)}, {})
    assert caught.value.tensor == "x"


def test_a_cast_keeps_a_range_that_fits():
    spec = TensorSpec(name="x", dtype="int64", shape=(None, 2), axes="NT", range=(0.0, 300.0))
    assert Cast(tensor="x", dtype="int16").specs({"x": spec}, {})["x"].range == (0.0, 300.0)
    assert Cast(tensor="x", dtype="int8").specs({"x": spec}, {})["x"].range is None


def test_bool_becomes_one_and_zero_and_is_no_target():
    x = np.array([[True, False]])
    np.testing.assert_array_equal(run(Cast(tensor="x", dtype="int32"), {"x": x}, {"x": "NC"})["x"], [[1, 0]])
    with pytest.raises(FormatError, match="dtype: expected one of"):
        Cast(tensor="x", dtype="bool")


# --- quantize


@settings(max_examples=effort(60), deadline=None)
@given(REALS, st.sampled_from(["int8", "uint8", "int16", "uint16", "int32"]), st.floats(1e-3, 2.0), st.integers(0, 100))
def test_quantize_and_back_is_within_half_a_step(x, dtype, scale, zero_point):
    forth = Quantize(tensor="x", scale=scale, zero_point=zero_point, dtype=dtype)
    back = Dequantize(tensor="x", scale=scale, zero_point=zero_point)
    axes = {"x": letters(x)}
    stored = run(forth, {"x": x}, axes)["x"]
    limits = np.iinfo(dtype)
    wanted = np.clip(np.rint(x.astype(np.float64) / scale) + zero_point, limits.min, limits.max)
    assert np.abs(stored - wanted).max() <= 1  # the quotient of two floats may fall on the other side of a half
    real = run(back, {"x": stored}, axes)["x"]
    held = np.clip(x, (limits.min - zero_point) * scale, (float(limits.max) - zero_point) * scale)
    np.testing.assert_allclose(real, held, atol=0.5001 * scale + 1e-5 * np.abs(held).max())


def test_quantize_rounds_half_to_even_and_clips():
    x = np.array([[0.5, 1.5, -0.5, 1e9, -1e9, 3.4e38]], np.float32)
    made = run(Quantize(tensor="x", scale=1e-3 * 1000), {"x": x}, {"x": "NC"})["x"]
    np.testing.assert_array_equal(made, [[0, 2, 0, 127, -128, 127]])


def test_dequantize_of_the_last_integers_does_not_wrap():
    x = np.array([[-(2**31), 2**31 - 1]], np.int32)
    made = run(Dequantize(tensor="x", scale=1.0, zero_point=2**31 - 1), {"x": x}, {"x": "NC"})["x"]
    np.testing.assert_allclose(made, [[-(2.0**32) + 1, 0.0]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantize_refuses_what_is_no_number(value):
    with pytest.raises(NotFiniteError, match="'x' has NaN or infinite values to quantize"):
        Quantize(tensor="x", scale=1.0).apply({"x": np.array([[value]], np.float32)}, {})


def test_a_zero_point_must_be_a_value_of_the_dtype():
    with pytest.raises(FormatError, match="zero_point: 128 is no value of int8"):
        Quantize(tensor="x", scale=1.0, zero_point=128)
    with pytest.raises(FormatError, match="zero_point: -1 is no value of uint8"):
        Dequantize(tensor="x", scale=1.0, zero_point=-1).specs(
            {"x": spec_of("x", np.zeros((1, 2), np.uint8), "NC")}, {}
        )
    with pytest.raises(FormatError, match="scale: expected a number"):
        Quantize(tensor="x", scale=0.0)


# --- rename


def test_rename_keeps_the_place():
    tensors = {"a": np.zeros((1, 2), np.float32), "b": np.ones((1, 3), np.int8), "c": np.zeros((1,), np.int64)}
    made = run(Rename(tensor="b", to="z"), tensors, {"a": "NC", "b": "NC", "c": "N"})
    assert list(made) == ["a", "z", "c"]
    assert made["z"] is tensors["b"]
    specs = {name: spec_of(name, array) for name, array in tensors.items()}
    with pytest.raises(FormatError, match="there would be two tensors 'c'"):
        Rename(tensor="b", to="c").specs(specs, {})


# --- scores


@settings(max_examples=effort(50), deadline=None)
@given(REALS, st.data())
def test_softmax_is_its_formula_on_any_axis_but_the_batch(x, data):
    axis = data.draw(st.integers(1, x.ndim - 1)) - data.draw(st.sampled_from([0, x.ndim]))
    made = run(Softmax(tensor="x", axis=axis), {"x": x}, {"x": letters(x)})["x"]
    powers = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(made, powers / powers.sum(axis, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_softmax_and_sigmoid_keep_the_dtype_and_do_not_overflow(dtype):
    big = float(np.finfo(dtype).max) / 2
    x = np.array([[big, 0.0, -big]], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft = run(Softmax(tensor="x"), {"x": x}, {"x": "NC"})["x"]
        each = run(Sigmoid(tensor="x"), {"x": x}, {"x": "NC"})["x"]
    np.testing.assert_array_equal(soft, [[1, 0, 0]])
    np.testing.assert_array_equal(each, [[1, 0.5, 0]])


@settings(max_examples=effort(40), deadline=None)
@given(REALS)
def test_sigmoid_is_its_formula(x):
    made = run(Sigmoid(tensor="x"), {"x": x}, {"x": letters(x)})["x"]
    np.testing.assert_allclose(made, 1 / (1 + np.exp(-x.astype(np.float64))), atol=1e-6)


LEVEL = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])
)


@settings(max_examples=effort(60), deadline=None)
@given(LEVEL, st.data())
def test_top_k_is_a_sort_where_the_lower_class_wins(x, data):
    k = data.draw(st.integers(1, x.shape[1]))
    made = run(TopK(tensor="logits", k=k), {"logits": x}, {"logits": "NC"})
    assert list(made) == ["scores", "classes"]
    for row, scores, classes in zip(x.tolist(), made["scores"].tolist(), made["classes"].tolist(), strict=True):
        wanted = sorted(range(len(row)), key=lambda at: (-row[at], at))[:k]
        assert classes == wanted and scores == [row[at] for at in wanted]


def test_top_k_puts_nan_last_and_refuses_more_than_there_are():
    x = np.array([[np.nan, 1.0, 2.0]], np.float32)
    assert TopK(tensor="x", k=3).apply({"x": x}, {})["classes"].tolist() == [[2, 1, 0]]
    with pytest.raises(FormatError, match="'x' has 3 classes, 4 are asked for"):
        TopK(tensor="x", k=4).specs({"x": spec_of("x", x, "NC")}, {})
    with pytest.raises(FormatError, match="two tensors 'scores'"):
        TopK(tensor="x", k=1, classes="scores").specs(
            {"x": spec_of("x", x, "NC"), "scores": spec_of("scores", x, "NC")}, {}
        )


@pytest.mark.parametrize("step", [Softmax(tensor="x", axis=0), TopK(tensor="x", k=1), Argmax(tensor="x", axis=-2)])
def test_the_batch_is_no_axis_to_work_on(step):
    x = np.zeros((3,) if isinstance(step, TopK) else (3, 4), np.float32)
    with pytest.raises(FormatError, match=r"'x': axis -?[0-2] is the batch"):
        step.specs({"x": spec_of("x", x, "NC"[: x.ndim])}, {})


@pytest.mark.parametrize("kind", [Softmax, Argmax])
def test_an_axis_that_is_not_there_is_refused(kind):
    with pytest.raises(FormatError, match="'x' has 2 axes, none of number 2"):
        kind(tensor="x", axis=2).specs({"x": spec_of("x", np.zeros((3, 4), np.float32), "NC")}, {})


@settings(max_examples=effort(40), deadline=None)
@given(REALS, st.data())
def test_argmax_is_numpys_and_loses_its_axis(x, data):
    axis = data.draw(st.integers(1, x.ndim - 1))
    made = run(Argmax(tensor="x", axis=axis), {"x": x}, {"x": letters(x)})["x"]
    np.testing.assert_array_equal(made, x.argmax(axis))


# --- masks


@pytest.mark.parametrize("axes", ["NCHW", "NHWC"])
def test_a_mask_in_the_networks_size(axes):
    scores = np.random.default_rng(0).standard_normal((2, 5, 4, 6)).astype(np.float32)
    turned = scores.transpose(["NCHW".index(letter) for letter in axes])
    made = run(MaskArgmax(tensor="mask", axes=axes), {"mask": turned}, {"mask": axes})["mask"]
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, scores.argmax(1))


@settings(max_examples=effort(40), deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["NHWC", "NCHW"]))
def test_a_mask_in_the_callers_size_is_its_nearest_pixels(height, width, image_axes):
    scores = np.random.default_rng(1).standard_normal((1, 3, 8, 12)).astype(np.float32)
    shape = {"N": 1, "H": height, "W": width, "C": 3}
    callers = {"image": np.zeros([shape[letter] for letter in image_axes], np.uint8)}
    step = MaskArgmax(tensor="mask", image="image", image_axes=image_axes)
    made = run(step, {"mask": scores}, {"mask": "NCHW"}, callers=callers)["mask"][0]
    mask = scores[0].argmax(0)
    rows = (2 * np.arange(height) + 1) * 8 // (2 * height)
    columns = (2 * np.arange(width) + 1) * 12 // (2 * width)
    np.testing.assert_array_equal(made, mask[np.ix_(rows, columns)])


def test_a_mask_of_a_letterboxed_picture_is_where_the_picture_was():
    image = np.zeros((1, 30, 60, 3), np.uint8)
    image[:, 10:20, 15:45] = 255  # a bright middle on black, on the grey ground of the letterbox
    boxed = Letterbox(tensor="image", height=48, width=48, method="nearest").apply({"image": image}, {})["image"]
    bright = (boxed[..., :1] > 200).astype(np.float32)
    scores = np.concatenate([1 - bright, bright], -1)
    step = MaskArgmax(tensor="mask", axes="NHWC", image="image", fit="letterbox")
    made = run(step, {"mask": scores}, {"mask": "NHWC"}, callers={"image": image})["mask"]
    wanted = image[..., 0] > 0
    assert made.shape == wanted.shape
    assert (made.astype(bool) != wanted).mean() < 0.03  # the edges, by a pixel
    stretched = MaskArgmax(tensor="mask", axes="NHWC", image="image").apply({"mask": scores}, {"image": image.shape})
    assert (stretched["mask"].astype(bool) != wanted).mean() > 0.05


def test_what_a_mask_cannot_be_made_of():
    scores = np.zeros((1, 257, 4, 4), np.float32)
    specs = {"mask": spec_of("mask", scores, "NCHW")}
    with pytest.raises(FormatError, match="'mask' has C = 257, expected 1 to 256 classes"):
        MaskArgmax(tensor="mask").specs(specs, {})
    assert MaskArgmax(tensor="mask", dtype="int32").specs(specs, {})["mask"].shape == (None, 4, 4)
    with pytest.raises(FormatError, match="the caller passes no 'photo'"):
        MaskArgmax(tensor="mask", dtype="int32", image="photo").specs(specs, {"image": (None, 4, 4, 3)})
    with pytest.raises(FormatError, match="'image' has 3 axes, the step says NHWC"):
        MaskArgmax(tensor="mask", dtype="int32", image="image").specs(specs, {"image": (None, 4, 4)})
    with pytest.raises(ShapeError, match=r"'image' has shape \[1, 0, 4, 3\]"):
        MaskArgmax(tensor="mask", image="image").apply({"mask": scores}, {"image": (1, 0, 4, 3)})
