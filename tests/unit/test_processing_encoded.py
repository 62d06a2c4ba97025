"""Images as the bytes of a file."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outrider_runtimes.errors import FormatError, InputError, OutriderError, ShapeError
from outrider_runtimes.processing import (
    BoxesToImage,
    CornerBoxes,
    DecodeImage,
    Letterbox,
    Normalise,
    Resize,
    around,
    callers_of,
    encode_images,
    infer_specs,
    step_from_dict,
)
from outrider_runtimes.processing.base import MAX_DECODED_PIXELS
from outrider_runtimes.processing.fields import MAX_PIXELS
from outrider_runtimes.tensors import Interface, TensorSpec
from support.effort import effort
from support.peaks import peak_bytes

JPEG, PNG = DecodeImage(tensor="image"), DecodeImage(tensor="image", content_type="image/png")
FILE = TensorSpec(name="image", dtype="uint8", shape=(None, None), axes="NT", content_type="image/jpeg")


def pixels(rows=1, height=24, width=36, channels=3, seed=0):
    """Smooth images, which JPEG keeps well: uint8 [rows, height, width, channels]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(5, 9) + y / rng.uniform(5, 9)) for _ in range(rows * channels)]
    return (127 + 100 * np.stack(waves)).astype(np.uint8).reshape(rows, channels, height, width).transpose(0, 2, 3, 1)


def file_of(image, form="JPEG", **options):
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, form, **options)
    return stream.getvalue()


def test_png_comes_back_to_the_bit_and_jpeg_as_pillow_decodes_it():
    images = pixels(rows=3)
    rows = encode_images([file_of(image, "PNG") for image in images])
    np.testing.assert_array_equal(PNG.apply({"image": rows}, {})["image"], images)
    files = [file_of(image, quality=90) for image in images]
    decoded = JPEG.apply({"image": encode_images(files)}, {})["image"]
    np.testing.assert_array_equal(decoded, [np.asarray(Image.open(io.BytesIO(file))) for file in files])
    assert np.abs(decoded.astype(int) - images).mean() < 3


@pytest.mark.parametrize("stored", [1, 3])
@pytest.mark.parametrize(("colours", "channels"), [("rgb", 3), ("grey", 1)])
def test_colours_are_as_asked_whatever_the_file_has(stored, colours, channels):
    image = pixels(channels=stored)[0]
    step = DecodeImage(tensor="image", content_type="image/png", colours=colours)
    made = step.apply({"image": encode_images([file_of(image, "PNG")])}, {})["image"]
    assert made.shape == (1, 24, 36, channels) and made.dtype == np.uint8
    if stored == channels:
        np.testing.assert_array_equal(made[0], image)


def test_no_rows_are_no_images():
    made = JPEG.apply({"image": np.zeros((0, 5), np.uint8)}, {})["image"]
    assert made.shape == (0, 1, 1, 3)


def test_its_specs_name_what_a_caller_passes():
    (made,) = infer_specs([JPEG], [FILE], callers_of([JPEG], [FILE]))
    assert (made.shape, made.axes, made.dtype, made.content_type) == ((None, None, None, 3), "NHWC", "uint8", "")
    for wrong, what in (
        (TensorSpec(name="image", dtype="uint8", shape=(None, None), axes="NT"), "is no file, expected image/jpeg"),
        (TensorSpec(name="image", dtype="float32", shape=(None, None), axes="NT"), "is float32, expected uint8"),
        (TensorSpec(name="image", dtype="uint8", shape=(None, 8, 8, 3), axes="NHWC"), "has axes NHWC"),
    ):
        with pytest.raises(FormatError, match=what):
            infer_specs([JPEG], [wrong], {})
    with pytest.raises(FormatError, match="image/jpeg is in uint8 with axes NT, not float32"):
        TensorSpec(name="image", dtype="float32", shape=(None, None), axes="NT", content_type="image/jpeg")


def test_the_content_type_is_of_the_interface_and_counts_in_its_digest():
    assert TensorSpec.from_dict(json.loads(json.dumps(FILE.to_dict()))) == FILE
    output = (TensorSpec(name="y", dtype="float32", shape=(None, 2), axes="NC"),)
    other = TensorSpec(name="image", dtype="uint8", shape=(None, None), axes="NT", content_type="image/png")
    assert Interface(inputs=(FILE,), outputs=output).digest != Interface(inputs=(other,), outputs=output).digest


def bomb(height, width):
    """A PNG whose head announces more pixels than are in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("step", "file", "why"),
    [
        (JPEG, b"", "is no image/jpeg"),
        (JPEG, b"\xff\xd8\xff", "is no image/jpeg"),
        (JPEG, file_of(pixels()[0], "PNG"), "is no image/jpeg"),
        (PNG, file_of(pixels()[0], "GIF"), "is no image/png"),
        (JPEG, file_of(pixels(height=200)[0])[:-900], "cannot be decoded"),
        (PNG, bomb(4097, 4096), f"at most {MAX_PIXELS} are decoded"),
        (PNG, bomb(60_000, 60_000), "more than"),
        (PNG, bomb(64, 64), "cannot be decoded"),
    ],
)
def test_what_is_no_such_image_is_refused_by_its_row(step, file, why):
    good = file_of(pixels()[0], "JPEG" if step is JPEG else "PNG")
    rows = encode_images([good, file]) if "pixels" in why else encode_images([file])
    with pytest.raises(InputError, match=why) as caught:
        step.apply({"image": rows}, {})
    assert caught.value.tensor == "image"
    assert step.apply({"image": encode_images([good])}, {})["image"].shape == (1, 24, 36, 3)


def test_the_pixels_of_a_call_are_bounded_before_any_is_decoded():
    """A few kB may be gigabytes; the exporter, which prepares so many rows at a time, is not bound by it."""
    file = TensorSpec(name="image", dtype="uint8", shape=(None, None), axes="NT", content_type="image/png")
    made = TensorSpec(name="image", dtype="uint8", shape=(None, 8, 8, 3), axes="NHWC", range=(0.0, 255.0))
    network = Interface(inputs=(made,), outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 2), axes="NC"),))
    taken = around(network, [file], [PNG, Resize(tensor="image", height=8, width=8)], [])
    rows = encode_images([bomb(4096, 4096)] * 9)

    def refused() -> None:
        with pytest.raises(InputError, match=f"9 images of 4096 x 4096 pixels, at most {MAX_DECODED_PIXELS}") as caught:
            taken.processing.prepare(taken, {"image": rows})
        assert caught.value.tensor == "image" and caught.value.hint

    assert peak_bytes(refused) < 1 << 20
    small = encode_images([file_of(pixels()[0], "PNG")] * 3)
    assert taken.processing.prepare(taken, {"image": small})["image"].shape == (3, 8, 8, 3)


def test_images_of_two_sizes_are_no_batch():
    rows = encode_images([file_of(pixels()[0]), file_of(pixels(width=37)[0])])
    with pytest.raises(ShapeError, match="row 1 is an image of 24 x 37, the first of 24 x 36"):
        JPEG.apply({"image": rows}, {})


def test_a_file_longer_than_a_row_is_refused():
    with pytest.raises(InputError, match="image 1 has 3 bytes, expected at most 2"):
        encode_images([b"ab", b"abc"], length=2)


@settings(max_examples=effort(60), deadline=None)
@given(st.data())
def test_a_file_with_any_bytes_changed_is_an_image_or_a_typed_error(data):
    file = bytearray(file_of(pixels(seed=1)[0], quality=50))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    try:
        made = JPEG.apply({"image": encode_images([bytes(file[:cut])])}, {})["image"]
    except OutriderError:
        return
    assert made.ndim == 4 and made.dtype == np.uint8


def test_boxes_go_back_to_the_image_in_the_file():
    """What is undone after the network was done to the pixels, not to the bytes."""
    network = Interface(
        inputs=(TensorSpec(name="image", dtype="float32", shape=(None, 12, 12, 3), axes="NHWC"),),
        outputs=(TensorSpec(name="boxes", dtype="float32", shape=(None, 1, 4), axes="NPD"),),
    )
    before = [
        step_from_dict(JPEG.to_dict(), "preprocessing[0]"),
        Letterbox(tensor="image", height=12, width=12),
        Normalise(tensor="image", mean=(0.0,), std=(1.0,)),
    ]
    after = [
        CornerBoxes(tensor="boxes", form="xyxy"),
        BoxesToImage(tensor="boxes", image="image", height=12, width=12),
    ]
    interface = around(network, [FILE], before, after)
    again = Interface.from_dict(json.loads(json.dumps(interface.to_dict())))
    assert again == interface
    inputs = {"image": encode_images([file_of(pixels(height=24, width=36)[0])])}
    assert again.processing is not None
    assert again.processing.prepare(again, inputs)["image"].shape == (1, 12, 12, 3)
    boxes = {"boxes": np.array([[[0, 2, 12, 10]]], np.float32)}  # 36 x 24 in 12 x 12: a third, ground of 2 above
    np.testing.assert_allclose(again.processing.finish(boxes, inputs)["boxes"], [[[0, 0, 36, 24]]])
