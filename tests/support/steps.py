"""Specs for steps, one run of a step with all that must hold of any, and an example of each kind."""

from __future__ import annotations

import json

import numpy as np

from outrider_runtimes.processing import (
    MFCC,
    AnchorBoxes,
    Argmax,
    BoxesToImage,
    Cast,
    CenterCrop,
    CornerBoxes,
    DecodeImage,
    Dequantize,
    GridBoxes,
    Layout,
    Letterbox,
    LogMel,
    MaskArgmax,
    Normalise,
    Quantize,
    Rename,
    Resize,
    Sigmoid,
    Softmax,
    Suppression,
    TokenLookup,
    TopK,
    infer_specs,
    step_from_dict,
)
from outrider_runtimes.tensors import TensorSpec

RATE = 16_000


def sound(samples=4000, rows=2):
    """Tones that glide, and noise, at 16 kHz: float32 [rows, samples] in -1..1."""
    t = np.arange(samples) / RATE
    tones = [0.4 * np.sin(2 * np.pi * (300 + 200 * row + 900 * t) * t) for row in range(rows)]
    return (np.stack(tones) + 0.05 * np.random.default_rng(0).standard_normal((rows, samples))).astype(np.float32)


def spec_of(name, array, axes="", free="", content_type=""):
    """The spec of an array: N is open, and so are the axes in ``free``."""
    open_axes = ("N" if axes.startswith("N") else "") + free
    shape = tuple(
        None if letter in open_axes else size
        for letter, size in zip(axes or "?" * array.ndim, array.shape, strict=True)
    )
    return TensorSpec(name=name, dtype=array.dtype.name, shape=shape, axes=axes, content_type=content_type)


def run(step, inputs, axes, *, free="", callers=None):
    """What a step gives, checked: its specs agree, its inputs are untouched, stored and rebuilt it is the same.

    Args:
        axes: of each input, by name.
        callers: the caller's inputs by name; the step's own where left out.
    """
    callers = inputs if callers is None else callers
    shapes = {name: array.shape for name, array in callers.items()}
    before = {name: array.copy() for name, array in inputs.items()}
    for array in inputs.values():
        array.flags.writeable = False
    outputs = step.apply(inputs, shapes)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])
    specs = [spec_of(name, array, axes[name], free) for name, array in inputs.items()]
    made = infer_specs([step], specs, shapes)
    assert [spec.name for spec in made] == list(outputs)
    for spec in made:
        fits(spec, outputs[spec.name])
    again = step_from_dict(json.loads(json.dumps(step.to_dict())), "step")
    assert again == step and type(again) is type(step) and hash(again) == hash(step)
    return outputs


def fits(spec, array):
    assert array.dtype.name == spec.dtype
    assert array.ndim == len(spec.shape)
    assert all(want is None or want == size for want, size in zip(spec.shape, array.shape, strict=True))
    if spec.range is not None and array.size:
        slack = 1e-6 * max(1.0, *map(abs, spec.range))
        assert spec.range[0] - slack <= array.min() and array.max() <= spec.range[1] + slack


# One of each kind with every key away from its default where it can be: the registry, the page and the rebuild see all.
EXAMPLES = (
    DecodeImage(tensor="image", content_type="image/png", colours="grey"),
    Resize(tensor="image", height=5, width=7, axes="NCHW", method="bicubic"),
    Letterbox(tensor="image", height=5, width=7, axes="NCHW", fill=3.0, method="nearest"),
    CenterCrop(tensor="image", height=5, width=7, axes="NCHW"),
    Normalise(tensor="image", mean=(0.1, 0.2), std=(0.5, 0.25), divided_by=255.0, axes="NCHW"),
    Layout(tensor="image", axes="NCHW", to="NHWC"),
    Rename(tensor="image", to="pixels"),
    Cast(tensor="image", dtype="int16"),
    Quantize(tensor="image", scale=0.5, zero_point=3, dtype="uint8"),
    Dequantize(tensor="image", scale=0.5, zero_point=3),
    LogMel(
        tensor="sound",
        sample_rate=8000,
        n_fft=64,
        hop=20,
        window=50,
        n_mels=12,
        f_min=20.0,
        f_max=3000.0,
        power=1.0,
        scale="htk",
        norm="none",
        centred=False,
        log="decibel",
        floor=1e-6,
        offset=1e-3,
        below_peak=80.0,
        axes="NTF",
    ),
    MFCC(tensor="sound", n_mfcc=4, axes="NTF"),
    TokenLookup(
        tensor="text",
        vocabulary=("a", "b"),
        length=3,
        lowercase=False,
        strip_punctuation=False,
        pad_id=9,
        unknown_id=8,
        first_id=4,
        dtype="int64",
    ),
    Softmax(tensor="scores", axis=1),
    Sigmoid(tensor="scores"),
    TopK(tensor="scores", k=2, scores="best", classes="which"),
    Argmax(tensor="scores", axis=1),
    MaskArgmax(tensor="mask", axes="NHWC", dtype="int32", image="image", image_axes="NCHW", fit="letterbox"),
    GridBoxes(
        tensor="boxes",
        height=32,
        width=48,
        strides=(8, 16),
        form="cxcywh",
        offsets="sigmoid",
        sides="exp",
        side_scale=2.0,
    ),
    AnchorBoxes(tensor="boxes", anchors=((1.0, 2.0, 3.0, 4.0),), variances=(0.1, 0.2, 0.3, 0.4), order="yxhw"),
    CornerBoxes(tensor="boxes", form="yxyx", x_scale=48.0, y_scale=32.0),
    Suppression(
        boxes="boxes",
        scores="odds",
        classes="kinds",
        count="found",
        iou_threshold=0.4,
        score_threshold=0.1,
        max_detections=9,
        candidates=50,
        first_class=1,
        class_aware=False,
        multi_label=False,
    ),
    BoxesToImage(tensor="boxes", image="image", height=32, width=48, axes="NCHW", fit="stretch"),
)
