"""Resize, letterbox, crop, normalise, layout; Pillow is the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing import CenterCrop, Layout, Letterbox, MaskArgmax, Normalise, Resize
from outrider_runtimes.processing.geometry import placed
from outrider_runtimes.tensors import TensorSpec
from support.effort import effort
from support.steps import run, spec_of

PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
SIZES = st.integers(1, 70)


def noise(seed, shape, dtype="uint8"):
    values = np.random.default_rng(seed).integers(0, 256, shape)
    return values.astype(dtype)


def picture(height, width, rows=1):
    """Smooth with some edges, as a photograph: uint8 [rows, height, width, 3]."""
    v, u = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        np.sin(6 * u + row) * np.cos(5 * v) + (u + 0.3 * channel > v) for row in range(rows) for channel in range(3)
    ]
    stacked = np.stack(waves, -1).reshape(height, width, rows, 3).transpose(2, 0, 1, 3)
    return np.clip(70 * stacked + 80, 0, 255).astype(np.uint8)


def in_two_passes(image, height, width, method):
    """Pillow's, columns and then rows: which of the two comes first differs from version to version."""
    columns = Image.fromarray(image).resize((width, image.shape[0]), PILLOW[method])
    return np.asarray(columns.resize((width, height), PILLOW[method]))


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@settings(max_examples=effort(60), deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 99))
def test_uint8_is_pillows_to_the_bit(method, high, wide, height, width, seed):
    image = noise(seed, (2, high, wide, 3))
    step = Resize(tensor="image", height=height, width=width, method=method)
    made = run(step, {"image": image}, {"image": "NHWC"}, free="HW")["image"]
    for row, source in zip(made, image, strict=True):
        np.testing.assert_array_equal(row, in_two_passes(source, height, width, method))


@pytest.mark.parametrize("size", [(24, 32), (31, 40), (60, 80), (97, 131), (200, 40)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_a_picture_is_within_one_level_of_pillows_single_call(method, size):
    image = picture(60, 80)
    step = Resize(tensor="image", height=size[0], width=size[1], method=method)
    made = run(step, {"image": image}, {"image": "NHWC"})["image"][0]
    wanted = np.asarray(Image.fromarray(image[0]).resize(size[::-1], PILLOW[method]))
    assert np.abs(made.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@settings(max_examples=effort(40), deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_float32_is_pillows(method, high, wide, height, width):
    image = noise(high * 71 + wide, (1, high, wide), "float32")
    step = Resize(tensor="image", height=height, width=width, method=method, axes="NHW")
    made = run(step, {"image": image}, {"image": "NHW"})["image"][0]
    wanted = np.asarray(Image.fromarray(image[0]).resize((width, height), PILLOW[method]))
    np.testing.assert_allclose(made, wanted, atol=1e-3)  # of 255


@settings(max_examples=effort(60), deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_nearest_is_pillows_where_no_pixel_is_nearer(high, wide, height, width):
    image = noise(height, (1, high, wide, 3))
    step = Resize(tensor="image", height=height, width=width, method="nearest")
    made = run(step, {"image": image}, {"image": "NHWC"})["image"][0]
    wanted = np.asarray(Image.fromarray(image[0]).resize((width, height), PILLOW["nearest"]))
    rows = (2 * np.arange(height) + 1) * high % (2 * height) != 0  # on an edge, Pillow's rounding decides
    columns = (2 * np.arange(width) + 1) * wide % (2 * width) != 0
    np.testing.assert_array_equal(made[rows][:, columns], wanted[rows][:, columns])


@given(st.permutations("HWC"), st.sampled_from(["uint8", "float32"]), st.integers(0, 3))
@settings(max_examples=effort(30), deadline=None)
def test_any_layout_and_any_number_of_rows(letters, dtype, rows):
    axes = "N" + "".join(letters)
    image = noise(7, (rows, 12, 9, 3), dtype)
    turned = image.transpose(["NHWC".index(letter) for letter in axes])
    for kind, size in ((Resize, (5, 14)), (Letterbox, (11, 8)), (CenterCrop, (6, 7))):
        sides = {"tensor": "image", "height": size[0], "width": size[1]}
        made = run(kind(**sides, axes=axes), {"image": turned}, {"image": axes}, free="HW")["image"]
        wanted = kind(**sides).apply({"image": image}, {})["image"]
        np.testing.assert_array_equal(made.transpose([axes.index(letter) for letter in "NHWC"]), wanted)


def test_a_large_picture_in_chunks_is_the_same():
    image = noise(0, (1, 300, 2100, 3))
    step = Resize(tensor="image", height=40, width=1900)
    np.testing.assert_array_equal(
        step.apply({"image": image}, {})["image"][0], in_two_passes(image[0], 40, 1900, "bilinear")
    )


def test_a_picture_of_its_own_size_is_passed_on():
    image = noise(0, (1, 6, 8, 3))
    for kind in (Resize, Letterbox, CenterCrop):
        step = kind(tensor="image", height=6, width=8)
        np.testing.assert_array_equal(run(step, {"image": image}, {"image": "NHWC"})["image"], image)


# --- letterbox


@settings(max_examples=effort(80), deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 200), st.integers(1, 200))
def test_a_letterbox_is_the_largest_that_fits_in_the_middle(high, wide, height, width):
    place = placed((high, wide), (height, width), "letterbox")
    assert place.height == height or place.width == width
    assert 1 <= place.height <= height and 1 <= place.width <= width
    below, right = height - place.height - place.top, width - place.width - place.left
    assert place.top <= below <= place.top + 1 and place.left <= right <= place.left + 1
    scale = min(height / high, width / wide)
    assert abs(place.height - max(1, high * scale)) <= 0.5 + 1e-9
    assert abs(place.width - max(1, wide * scale)) <= 0.5 + 1e-9


@pytest.mark.parametrize("axes", ["NHWC", "NCHW"])
def test_a_letterbox_is_pillows_resize_on_a_ground(axes):
    image = picture(30, 60)
    step = Letterbox(tensor="image", height=41, width=40, fill=114, axes=axes)
    turned = image.transpose(["NHWC".index(letter) for letter in axes])
    made = run(step, {"image": turned}, {"image": axes}, free="HW")["image"]
    made = made.transpose([axes.index(letter) for letter in "NHWC"])[0]
    np.testing.assert_array_equal(made[10:30], in_two_passes(image[0], 20, 40, "bilinear"))
    assert (made[:10] == 114).all() and (made[30:] == 114).all() and made[30:].shape[0] == 11


def test_the_ground_widens_the_range_and_must_be_a_value_of_the_dtype():
    image = TensorSpec(name="image", dtype="float32", shape=(None, 4, 4, 1), axes="NHWC", range=(0.0, 1.0))
    step = Letterbox(tensor="image", height=2, width=3, fill=-0.5)
    assert step.specs({"image": image}, {})["image"].range == (-0.5, 1.0)
    whole = spec_of("image", noise(0, (1, 4, 4, 1)), "NHWC")
    for fill in (0.5, -1.0, 256.0):
        with pytest.raises(FormatError, match="'image', which is uint8"):
            Letterbox(tensor="image", height=2, width=3, fill=fill).specs({"image": whole}, {})


def test_a_filter_that_overshoots_leaves_no_range():
    image = TensorSpec(name="image", dtype="float32", shape=(None, 4, 4, 1), axes="NHWC", range=(0.0, 1.0))
    edge = np.array([0, 0, 1, 1], np.float32).reshape(1, 1, 4, 1).repeat(4, 1)
    step = Resize(tensor="image", height=4, width=9, method="bicubic")
    assert step.apply({"image": edge}, {})["image"].max() > 1.0
    assert step.specs({"image": image}, {})["image"].range is None
    assert Resize(tensor="image", height=4, width=9).specs({"image": image}, {})["image"].range == (0.0, 1.0)


# --- crop


@settings(max_examples=effort(40), deadline=None)
@given(st.data())
def test_a_crop_is_the_middle(data):
    high, wide = data.draw(SIZES), data.draw(SIZES)
    height, width = data.draw(st.integers(1, high)), data.draw(st.integers(1, wide))
    image = noise(high, (1, high, wide, 1))
    step = CenterCrop(tensor="image", height=height, width=width)
    made = run(step, {"image": image}, {"image": "NHWC"})["image"]
    top, left = (high - height) // 2, (wide - width) // 2
    np.testing.assert_array_equal(made, image[:, top : top + height, left : left + width])


def test_a_crop_of_more_than_there_is_is_refused_before_or_at_the_call():
    step = CenterCrop(tensor="image", height=5, width=5)
    small = noise(0, (1, 4, 9, 3))
    with pytest.raises(FormatError, match="'image' has H = 4, less than 5"):
        step.specs({"image": spec_of("image", small, "NHWC")}, {})
    step.specs({"image": spec_of("image", small, "NHWC", free="HW")}, {})
    with pytest.raises(ShapeError, match="the crop is 5 x 5") as caught:
        step.apply({"image": small}, {})
    assert caught.value.tensor == "image"


@pytest.mark.parametrize("kind", [Resize, Letterbox])
def test_an_empty_picture_is_refused(kind):
    step = kind(tensor="image", height=5, width=5)
    with pytest.raises(ShapeError, match=r"'image' has shape \[1, 0, 4, 3\]"):
        step.apply({"image": np.zeros((1, 0, 4, 3), np.uint8)}, {})


# --- normalise and layout

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("axes", ["NHWC", "NCHW", "NCWH"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_normalise_is_its_formula_channel_by_channel(axes, dtype):
    image = noise(1, (2, 5, 6, 3), dtype)
    wanted = (image.astype(np.float64) / 255.0 - MEAN) / STD
    order = ["NHWC".index(letter) for letter in axes]
    step = Normalise(tensor="image", mean=MEAN, std=STD, divided_by=255.0, axes=axes)
    made = run(step, {"image": image.transpose(order)}, {"image": axes}, free="HW")["image"]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, wanted.transpose(order), atol=2e-6)


def test_normalise_by_one_number_needs_no_channels_and_carries_the_range():
    step = Normalise(tensor="x", mean=[1.0], std=[2.0], axes="NT")
    x = np.linspace(0, 4, 6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(run(step, {"x": x}, {"x": "NT"})["x"], (x - 1) / 2)
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 3), axes="NT", range=(0.0, 4.0))
    assert step.specs({"x": spec}, {})["x"].range == (-0.5, 1.5)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"mean": (1.0, 2.0), "std": (1.0, 2.0, 3.0)}, "mean has 2 numbers, std has 3"),
        ({"mean": (1.0, 2.0), "std": (1.0,), "axes": "NHW"}, "has no C"),
        ({"mean": (1.0,), "std": (0.0,)}, "std: expected a number of 1e-06"),
        ({"mean": (), "std": (1.0,)}, "mean: expected a list of 1"),
    ],
)
def test_normalise_refuses_what_does_not_fit(keys, match):
    with pytest.raises(FormatError, match=match):
        Normalise(tensor="image", **keys)


def test_normalise_refuses_another_number_of_channels():
    step = Normalise(tensor="image", mean=MEAN, std=STD)
    with pytest.raises(FormatError, match="of 3 channels"):
        step.specs({"image": spec_of("image", noise(0, (1, 4, 4, 4)), "NHWC")}, {})


@given(st.permutations("HWC"), st.permutations("HWC"))
def test_layout_and_back_is_the_same(first, second):
    one, other = "N" + "".join(first), "N" + "".join(second)
    sizes = {"N": 2, "H": 3, "W": 4, "C": 5}
    image = noise(3, [sizes[letter] for letter in one])
    turned = run(Layout(tensor="image", axes=one, to=other), {"image": image}, {"image": one})["image"]
    assert turned.shape == tuple(sizes[letter] for letter in other)
    back = run(Layout(tensor="image", axes=other, to=one), {"image": turned}, {"image": other})["image"]
    np.testing.assert_array_equal(back, image)


def test_layout_adds_and_leaves_out_axes_of_one():
    sound = noise(0, (2, 5, 7))
    added = run(Layout(tensor="x", axes="NFT", to="NTFC"), {"x": sound}, {"x": "NFT"}, free="T")["x"]
    np.testing.assert_array_equal(added, sound.transpose(0, 2, 1)[..., np.newaxis])
    back = run(Layout(tensor="x", axes="NTFC", to="NFT"), {"x": added}, {"x": "NTFC"})["x"]
    np.testing.assert_array_equal(back, sound)
    with pytest.raises(FormatError, match="'x' has F = 5, which NT leaves out"):
        Layout(tensor="x", axes="NFT", to="NT").specs({"x": spec_of("x", sound, "NFT")}, {})


# --- masks


def test_a_mask_in_the_callers_size_is_pillows_resize_of_it():
    scores = noise(5, (1, 3, 25, 21), "float32")  # odd sizes: no middle of a pixel on an edge
    made = MaskArgmax(tensor="mask", image="image").apply({"mask": scores}, {"image": (1, 53, 89, 3)})["mask"][0]
    mask = scores[0].argmax(0).astype(np.uint8)
    np.testing.assert_array_equal(made, np.asarray(Image.fromarray(mask).resize((89, 53), PILLOW["nearest"])))


# --- what all of them refuse


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"height": 0}, "height: expected a whole number of 1 to 8192, not 0"),
        ({"height": True}, "height: expected a whole number"),
        ({"height": 8193}, "height: expected"),
        ({"width": 3.0}, "width: expected"),
        ({"height": 8192, "width": 8192}, "8192 x 8192 pixels are more than 16777216"),
        ({"method": "lanczos"}, "method: expected one of bilinear, bicubic, nearest, not 'lanczos'"),
        ({"axes": "NHHC"}, "axes: expected at most 8 different capital letters"),
        ({"axes": "HWC"}, "axes: expected"),
        ({"axes": "NTC"}, "axes: NTC has no H"),
        ({"tensor": ""}, "tensor: expected a text"),
        ({"tensor": 7}, "tensor: expected a text"),
    ],
)
def test_a_hostile_key_is_refused(keys, match):
    with pytest.raises(FormatError, match=match):
        Resize(**{"tensor": "image", "height": 4, "width": 4, **keys})


def test_a_tensor_that_does_not_fit_is_named():
    step = Resize(tensor="image", height=4, width=4)
    with pytest.raises(FormatError, match="there is no tensor 'image'"):
        step.specs({}, {})
    with pytest.raises(FormatError, match="'image' has axes NCHW, the step works on NHWC"):
        step.specs({"image": spec_of("image", noise(0, (1, 3, 4, 4)), "NCHW")}, {})
    with pytest.raises(FormatError, match="'image' is int16, expected uint8 or float32"):
        step.specs({"image": spec_of("image", noise(0, (1, 4, 4, 3), "int16"), "NHWC")}, {})
