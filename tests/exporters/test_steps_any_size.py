"""A detector of pictures of any size, from export to the board: letterbox, decoding, suppression, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import outrider
from outrider_exporters import Data, MinMetric, export
from outrider_runtimes.errors import DtypeError, InputError
from outrider_runtimes.processing import (
    BoxesToImage,
    GridBoxes,
    Layout,
    Letterbox,
    Normalise,
    Sigmoid,
    Suppression,
)

pytestmark = pytest.mark.slow

SIDE, STRIDE = 64, 8
BEFORE = (
    Letterbox(tensor="image", height=SIDE, width=SIDE, fill=0),
    Normalise(tensor="image", mean=[0.0], std=[1.0], divided_by=255.0),
    Layout(tensor="image"),
)
AFTER = (
    GridBoxes(tensor="boxes", height=SIDE, width=SIDE, strides=[STRIDE], form="ltrb"),
    Sigmoid(tensor="scores"),
    Suppression(max_detections=8, score_threshold=0.5),
    BoxesToImage(tensor="boxes", image="image", height=SIDE, width=SIDE),
)


class Spots(nn.Module):
    """image: float32 [N, 3, 64, 64] -> boxes: [N, 64, 4], scores: [N, 64, 2]: cells that are red, cells that are blue.

    A box is its cell; weights are set by hand, so that what must be found is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 2, STRIDE, STRIDE)
        share = 1.0 / STRIDE**2
        weights = torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])[..., None, None] * share
        self.colours.weight.data = 40.0 * weights.expand(2, 3, STRIDE, STRIDE).contiguous()
        self.colours.bias.data = torch.full((2,), -24.0)
        self.register_buffer("sides", torch.full((1, (SIDE // STRIDE) ** 2, 4), 0.5))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.colours(image).flatten(2).transpose(1, 2)
        return self.sides.expand(len(image), -1, -1), scores


def picture(height: int, width: int, spots: list[tuple[int, tuple[float, float]]]) -> np.ndarray:
    """Black, with a spot of a colour (0: red, 1: blue) around each middle, given in cells of the network's image."""
    image = np.zeros((1, height, width, 3), np.uint8)
    scale = max(height, width) / SIDE
    left, top = (scale * SIDE - width) / 2, (scale * SIDE - height) / 2
    for kind, (x, y) in spots:
        x0, y0 = round((x - 0.5) * STRIDE * scale - left), round((y - 0.5) * STRIDE * scale - top)
        side = round(STRIDE * scale)
        image[0, y0 : y0 + side, x0 : x0 + side, (0, 2)[kind]] = 255
    return image


SPOTS = [(0, (2.5, 3.5)), (1, (5.5, 4.5))]


def found(outputs):
    """Class and middle of each box, by class."""
    count = int(outputs["count"][0])
    boxes = outputs["boxes"][0, :count]
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    return sorted(zip(outputs["classes"][0, :count].tolist(), middles.tolist(), strict=True))


def evaluate(predict, test):
    inputs, wanted = test
    return {"found": float(len(found(predict(inputs))) == len(wanted))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    image = picture(96, 128, SPOTS)
    report = export(
        Spots().eval(),
        example={"image": image},
        outputs=["boxes", "scores"],
        axes={"image": "NHWC"},
        dynamic_axes={"image": "HW"},
        data=Data(test=({"image": image}, SPOTS)),
        evaluate=evaluate,
        gates=[MinMetric("found", at_least=1.0)],
        preprocessing=BEFORE,
        postprocessing=AFTER,
        labels=["red", "blue"],
        output=tmp_path_factory.mktemp("spots") / "spots.outrider",
    )
    return report.bundle


@pytest.mark.parametrize("variant", ["onnx-float32", "tflite-float32"])
def test_a_board_finds_the_spots_in_the_callers_pixels_whatever_the_size(bundle, tmp_path, variant):
    with outrider.load(bundle, state=tmp_path, variant=variant) as model:
        assert model.interface.inputs[0].shape == (None, None, None, 3)
        assert [spec.name for spec in model.interface.outputs] == ["boxes", "scores", "classes", "count"]
        for height, width in ((96, 128), (64, 64), (200, 150), (48, 120)):
            outputs = model.infer(picture(height, width, SPOTS)).outputs
            scale = max(height, width) / SIDE
            left, top = (scale * SIDE - width) / 2, (scale * SIDE - height) / 2
            wanted = [(k, [x * STRIDE * scale - left, y * STRIDE * scale - top]) for k, (x, y) in SPOTS]
            assert [kind for kind, _ in found(outputs)] == [0, 1]
            for (_, middle), (_, expected) in zip(found(outputs), wanted, strict=True):
                assert (
                    np.abs(np.subtract(middle, expected)).max() <= scale + 1
                )  # a pixel of the network's, and rounding
        none = model.infer(np.zeros((2, 30, 70, 3), np.uint8)).outputs
        assert none["count"].tolist() == [0, 0] and (none["classes"] == -1).all()


def test_a_picture_that_is_none_is_refused_and_the_next_one_is_answered(bundle, tmp_path):
    with outrider.load(bundle, state=tmp_path) as model:
        before = model.infer(picture(64, 64, SPOTS)).outputs
        with pytest.raises(InputError, match=r"'image' has shape \[1, 0, 64, 3\]: it is empty"):
            model.infer(np.zeros((1, 0, 64, 3), np.uint8))
        with pytest.raises(DtypeError):
            model.infer(np.zeros((1, 64, 64, 3), np.float32))
        after = model.infer(picture(64, 64, SPOTS)).outputs
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
