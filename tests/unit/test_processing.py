"""All kinds of steps together: the registry, the page, what is stored, chains around a network, hostile manifests."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes import processing
from outrider_runtimes.errors import BundleError, FormatError, InferenceError, InputError, UnsupportedBundle
from outrider_runtimes.processing import (
    MFCC,
    STEPS,
    BoxesToImage,
    CenterCrop,
    GridBoxes,
    Layout,
    Letterbox,
    LogMel,
    Normalise,
    Quantize,
    Rename,
    Resize,
    Sigmoid,
    Softmax,
    Suppression,
    TokenLookup,
    TopK,
    around,
    encode_text,
    infer_specs,
    run_steps,
    step_class,
    step_from_dict,
)
from outrider_runtimes.tensors import Interface, TensorSpec
from support.effort import effort
from support.steps import EXAMPLES, fits

PAGE = Path(__file__).parents[2] / "docs" / "steps.md"
SECTION = re.compile(r"^### `(\w+)`\n(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \|.*\| (`[^`]*`|required) \|$", re.MULTILINE)


def test_there_is_an_example_of_every_kind_with_no_key_at_its_default():
    assert [step.kind for step in EXAMPLES] == list(STEPS)
    assert [type(step) for step in EXAMPLES] == [step_class(kind) for kind in STEPS]
    for step in EXAMPLES:
        for field in dataclasses.fields(step):
            at_default = getattr(step, field.name) == field.default
            assert not at_default or field.name in ("tensor", "boxes"), (step.kind, field.name)


@pytest.mark.parametrize("step", EXAMPLES, ids=lambda step: step.kind)
def test_a_step_is_the_same_after_json(step):
    stored = step.to_dict()
    assert list(stored) == ["step", *(field.name for field in dataclasses.fields(step))]
    again = step_from_dict(json.loads(json.dumps(stored, allow_nan=False)), "step")
    assert again == step and hash(again) == hash(step) and again.to_dict() == stored


def test_the_page_has_one_table_a_kind_with_its_keys_and_defaults():
    sections = dict(SECTION.findall(PAGE.read_text() + "\n## end"))
    assert list(sections) == [
        "decode_image",
        "resize",
        "letterbox",
        "center_crop",
        "normalise",
        "layout",
        "rename",
        "cast",
        "quantize",
        "dequantize",
        "log_mel",
        "mfcc",
        "token_lookup",
        "softmax",
        "sigmoid",
        "top_k",
        "argmax",
        "mask_argmax",
        "grid_boxes",
        "anchor_boxes",
        "corner_boxes",
        "suppression",
        "boxes_to_image",
    ]
    assert list(sections) == list(STEPS)
    for kind, text in sections.items():
        wanted = [(field.name, default_of(field)) for field in dataclasses.fields(step_class(kind))]
        assert ROW.findall(text) == wanted, kind


def default_of(field):
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(field.default)}`"


# --- hostile manifests

WRONG = [None, True, -1, 2**40, 1.5, float("inf"), "", "x" * 300, [], [True], [[]], {}, {"a": 1}, ["a", None], "NHH"]


@settings(max_examples=effort(400), deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_any_other_value_makes_a_step_of_its_bounds_or_a_typed_error(step, data):
    stored = step.to_dict()
    key = data.draw(st.sampled_from(list(stored)))
    stored[key] = data.draw(st.sampled_from(WRONG))
    try:
        made = step_from_dict(stored, "postprocessing[0]")
    except BundleError as error:
        assert str(error).startswith("postprocessing[0]")
        return
    again = step_from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)), "step")
    assert again == made


SPECS = st.builds(
    TensorSpec,
    name=st.just("x"),
    dtype=st.sampled_from(["uint8", "float32", "int16", "bool", "float16"]),
    shape=st.lists(st.sampled_from([None, 0, 1, 2, 4, 2**31 - 1]), min_size=4, max_size=4).map(tuple),
    axes=st.sampled_from(["NCHW", "NHWC", "", "ABCD"]),
    range=st.sampled_from([None, (0.0, 1.0), (-1e308, 1e308)]),
)


@settings(max_examples=effort(400), deadline=None)
@given(st.sampled_from(EXAMPLES), SPECS, st.integers(1, 4), st.sampled_from([{}, {"image": (None, 3, None, 0)}]))
def test_inference_on_any_tensors_gives_specs_or_a_typed_error(step, spec, axes, callers):
    cut = dataclasses.replace(spec, shape=spec.shape[:axes], axes=spec.axes[:axes])
    names = ["image", "sound", "text", "scores", "mask", "boxes", "odds"]
    specs = {name: dataclasses.replace(cut, name=name) for name in names}
    try:
        made = step.specs(specs, callers)
    except FormatError:
        return
    assert all(name == out.name for name, out in made.items())


@pytest.mark.parametrize("step", EXAMPLES, ids=lambda step: step.kind)
def test_true_is_no_number_in_any_key(step):
    for key, value in step.to_dict().items():
        if type(value) in (int, float):
            with pytest.raises(FormatError, match=rf"at\[0\]: {key}: expected a"):
                step_from_dict({**step.to_dict(), key: True}, "at[0]")


def test_a_stray_a_missing_key_and_another_kind_are_named():
    stored = Softmax(tensor="x").to_dict()
    with pytest.raises(FormatError, match=r"at\[0\]\.temperature: softmax has no such key"):
        step_from_dict({**stored, "temperature": 2.0}, "at[0]")
    with pytest.raises(FormatError, match=r"at\[0\]: softmax is malformed.*'tensor'"):
        step_from_dict({"step": "softmax"}, "at[0]")
    for kind in ("soft_max", None, 3, ["softmax"]):
        with pytest.raises(UnsupportedBundle, match="has no step"):
            step_from_dict({**stored, "step": kind}, "at[0]")


# --- chains


def camera(axes="NHWC", dtype="uint8"):
    sizes = {"N": None, "H": None, "W": None, "C": 3}
    shape = tuple(sizes[letter] for letter in axes)
    return TensorSpec(name="image", dtype=dtype, shape=shape, axes=axes, range=(0.0, 255.0))


@st.composite
def image_chains(draw):
    """A chain of steps on pictures, any of which may follow any other."""
    axes, steps = "NHWC", []
    for kind in draw(st.lists(st.sampled_from(["resize", "box", "crop", "layout", "rename"]), max_size=5)):
        name = "image" if len([step for step in steps if step.kind == "rename"]) % 2 == 0 else "pixels"
        sides = {"tensor": name, "height": draw(st.integers(1, 20)), "width": draw(st.integers(1, 20)), "axes": axes}
        if kind == "resize":
            steps.append(Resize(**sides, method=draw(st.sampled_from(["bilinear", "bicubic", "nearest"]))))
        elif kind == "box":
            steps.append(Letterbox(**sides, fill=7))
        elif kind == "crop":
            steps += [Resize(**{**sides, "height": 20, "width": 20}), CenterCrop(**sides)]
        elif kind == "layout":
            other = "N" + "".join(draw(st.permutations("HWC")))
            steps.append(Layout(tensor=name, axes=axes, to=other))
            axes = other
        else:
            steps.append(Rename(tensor=name, to="pixels" if name == "image" else "image"))
    return steps


@settings(max_examples=effort(80), deadline=None)
@given(image_chains(), st.integers(0, 2), st.integers(1, 30), st.integers(1, 30), st.sampled_from(["uint8", "float32"]))
def test_what_a_chain_gives_is_what_was_inferred(steps, rows, height, width, dtype):
    image = np.random.default_rng(height).integers(0, 256, (rows, height, width, 3)).astype(dtype)
    before = image.copy()
    made = run_steps(steps, {"image": image}, {"image": image.shape})
    (spec,) = infer_specs(steps, [camera(dtype=dtype)], {"image": (None, None, None, 3)})
    assert list(made) == [spec.name]
    fits(spec, made[spec.name])
    np.testing.assert_array_equal(image, before)


def spec(name, shape, axes, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape, axes=axes)


DETECTOR = around(
    Interface(
        inputs=(spec("image", (None, 3, 32, 32), "NCHW"),),
        outputs=(spec("boxes", (None, 16, 4), "NPB"), spec("scores", (None, 16, 2), "NPC")),
    ),
    [camera()],
    [
        Letterbox(tensor="image", height=32, width=32),
        Normalise(tensor="image", mean=[0.0], std=[1.0], divided_by=255.0),
        Layout(tensor="image"),
    ],
    [
        GridBoxes(tensor="boxes", height=32, width=32, strides=[8], form="ltrb"),
        Sigmoid(tensor="scores"),
        Suppression(max_detections=5),
        BoxesToImage(tensor="boxes", image="image", height=32, width=32),
    ],
)


def test_a_detector_from_a_callers_picture_to_boxes_in_it():
    steps = DETECTOR.processing
    again = Interface.from_dict(json.loads(json.dumps(DETECTOR.to_dict())))
    assert again == DETECTOR and again.processing == steps
    image = np.full((2, 40, 80, 3), 255, np.uint8)
    prepared = steps.prepare(DETECTOR, {"image": image})["image"]
    assert prepared.shape == (2, 3, 32, 32) and prepared.max() == 1.0
    np.testing.assert_allclose(prepared[0, 0, :, 0], [114 / 255] * 8 + [1.0] * 16 + [114 / 255] * 8)
    boxes = np.full((2, 16, 4), 0.5, np.float32)  # each cell by itself
    scores = np.full((2, 16, 2), -9.0, np.float32)
    scores[0, 5, 1] = 9.0  # second row and column: 8..16 by 8..16, the ground ends at 8
    made = steps.finish({"boxes": boxes, "scores": scores}, {"image": image})
    assert made["count"].tolist() == [1, 0]
    assert made["classes"][0, 0] == 1
    np.testing.assert_allclose(made["boxes"][0, 0], [20, 0, 40, 20])
    for out in DETECTOR.outputs:
        fits(out, made[out.name])


def test_a_sound_and_a_text_and_classes_in_one_chain():
    steps = [
        LogMel(tensor="sound", sample_rate=8000, n_fft=128, hop=40, n_mels=20),
        MFCC(tensor="sound", n_mfcc=10),
        Layout(tensor="sound", axes="NFT", to="NTFC"),
        Quantize(tensor="sound", scale=0.1, dtype="uint8", zero_point=128),
        TokenLookup(tensor="text", vocabulary=["on", "off"], length=4),
        Rename(tensor="text", to="tokens"),
    ]
    inputs = {
        "sound": np.random.default_rng(0).standard_normal((2, 800)).astype(np.float32) / 9,
        "text": encode_text(["On, off!", "out"]),
    }
    specs = [spec("sound", (None, 800), "NT"), spec("text", (None, None), "NT", "uint8")]
    made = run_steps(steps, inputs, {})
    for out in infer_specs(steps, specs, {}):
        fits(out, made[out.name])
    assert made["sound"].shape == (2, 21, 10, 1)
    assert made["tokens"].tolist() == [[2, 3, 0, 0], [1, 0, 0, 0]]


def test_errors_name_the_step_by_its_place():
    steps = [Layout(tensor="image"), Resize(tensor="image", height=4, width=4)]
    with pytest.raises(FormatError, match=r"step 1 \(resize\): 'image' has axes NCHW, the step works on NHWC"):
        infer_specs(steps, [camera()], {})
    with pytest.raises(InputError, match=r"step 0 \(resize\): 'image' has shape") as caught:
        run_steps(steps[1:], {"image": np.zeros((1, 0, 5, 3), np.uint8)}, {})
    assert caught.value.tensor == "image"
    quantized = dataclasses.replace(DETECTOR.processing, after=(Quantize(tensor="scores", scale=1.0),))
    with pytest.raises(InferenceError, match=r"postprocessing: step 0 \(quantize\): 'scores' has NaN"):
        quantized.finish({"scores": np.full((1, 2), np.nan, np.float32)}, {})


def test_a_chain_that_does_not_lead_to_the_network_is_refused():
    network = DETECTOR.network
    with pytest.raises(FormatError, match="preprocessing gives 'image' with dtype 'uint8', expected 'float32'"):
        around(network, [camera()], [Resize(tensor="image", height=32, width=32), Layout(tensor="image")], [])
    with pytest.raises(FormatError, match=r"step 0 \(top_k\): there is no tensor 'logits'"):
        around(network, network.inputs, [], [TopK(tensor="logits", k=1)])
    stored = DETECTOR.to_dict()
    stored["outputs"][0]["shape"][1] = 6
    with pytest.raises(FormatError, match=r"postprocessing gives 'boxes' with shape"):
        Interface.from_dict(stored)


def test_steps_are_loaded_where_they_are_used_and_need_numpy_alone():
    code = (
        "import sys, numpy, outrider; assert not any('processing' in name for name in sys.modules)\n"
        "before = set(sys.modules); from outrider_runtimes.processing import STEPS, step_class, step_from_dict\n"
        "step_from_dict({'step': 'softmax', 'tensor': 'x'}, 'step')\n"
        "rooms = {name.split('.')[2] for name in sys.modules if name.startswith('outrider_runtimes.processing.')}\n"
        "assert rooms == {'base', 'fields', 'specs', 'scores'}, rooms\n"
        "kinds = [step_class(kind) for kind in STEPS]\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'outrider_runtimes', 'numpy'} | sys.stdlib_module_names, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_package_is_there():
    assert all(getattr(processing, name) is not None for name in processing.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Sharpen'"):
        _ = processing.Sharpen
