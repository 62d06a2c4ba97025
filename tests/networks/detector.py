"""Item 12: a one-stage detector on pictures of up to three shapes; its boxes are decoded and thinned by steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from networks.case import JUDGED, Case, Metric, Outputs, Predict, Trained, fit, held_out_rows, in_chunks
from networks.images import inside
from outrider_exporters import Data, MaxDrop, MinMetric
from outrider_runtimes.processing import (
    BoxesToImage,
    GridBoxes,
    Layout,
    Normalise,
    Softmax,
    Step,
    Suppression,
    run_steps,
)

MAP = Metric(name="map")
KINDS = ("disc", "square", "triangle")
SIZE, GRID = 48, 6
CELLS = GRID * GRID
MEAN_SIDE = 0.3
Scene = list[tuple[int, np.ndarray]]  # class, box as x0, y0, x1, y1 in pixels
BEFORE: tuple[Step, ...] = (
    Normalise(tensor="image", mean=[0.0], std=[1.0], divided_by=255.0),
    Layout(tensor="image", to="NCHW"),
)
AFTER: tuple[Step, ...] = (
    GridBoxes(
        tensor="boxes",
        height=SIZE,
        width=SIZE,
        strides=[SIZE // GRID],
        form="cxcywh",
        offsets="sigmoid",
        sides="exp",
        side_scale=MEAN_SIDE * GRID,
    ),
    Softmax(tensor="scores"),
    Suppression(iou_threshold=0.45, score_threshold=0.05, max_detections=CELLS, first_class=1),
    BoxesToImage(tensor="boxes", image="image", height=SIZE, width=SIZE),
)


class Detector(nn.Module):
    """image: float32 [N, 3, 48, 48] -> boxes: float32 [N, 36, 4], scores: float32 [N, 36, 4].

    A cell's box is its middle within the cell (logits) and the logarithm of its sides; its scores are the logits of
    nothing and of the three classes.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.boxes, self.scores = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 1 + len(KINDS), 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.features(image)
        return self.boxes(x).flatten(2).transpose(1, 2), self.scores(x).flatten(2).transpose(1, 2)


def scenes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Scene]]:
    """Pictures uint8 [N, 48, 48, 3], and what is on each."""
    drawn = [_scene(rng) for _ in range(count)]
    return np.stack([image for image, _ in drawn]), [scene for _, scene in drawn]


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """One to three shapes in different cells that do not touch, any colour, noise."""
    v, u = (np.mgrid[0:SIZE, 0:SIZE] + 0.5) / SIZE
    image = np.broadcast_to(rng.uniform(0.2, 0.8, (3, 1, 1)), (3, SIZE, SIZE)).copy()
    ground, taken, scene = image.copy(), np.zeros((SIZE, SIZE), bool), []
    for _ in range(rng.integers(1, 4)):
        r = rng.uniform(0.1, 0.2)
        x, y = rng.uniform(r, 1 - r, 2)
        kind = int(rng.integers(len(KINDS)))
        mask = inside(KINDS[kind], (u - x) / r, (v - y) / r)
        if (mask & taken).any():
            continue
        colour = ground + rng.choice([-1.0, 1.0]) * rng.uniform(0.2, 0.5, (3, 1, 1))
        image, taken = np.where(mask, colour, image), taken | mask
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        scene.append((kind, np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)))
    noisy = image + 0.08 * rng.standard_normal(image.shape)
    return np.rint(255.0 * np.clip(noisy, 0.0, 1.0)).astype(np.uint8).transpose(1, 2, 0), scene


def encoded(all_scenes: list[Scene]) -> np.ndarray:
    """float32 [N, 36, 5]: class + 1 (0: nothing) and the box as the network gives it, in the cell of its middle."""
    targets = np.zeros((len(all_scenes), CELLS, 5), np.float32)
    for target, scene in zip(targets, all_scenes, strict=True):
        for kind, box in scene:
            x0, y0, x1, y1 = box / SIZE
            x, y = (x0 + x1) / 2 * GRID, (y0 + y1) / 2 * GRID
            offset = np.clip([x % 1, y % 1], 0.02, 0.98)
            sides = np.log(np.array([x1 - x0, y1 - y0]) / MEAN_SIDE)
            target[int(y) * GRID + int(x)] = [kind + 1, *np.log(offset / (1 - offset)), *sides]
    return targets


def decoded(boxes: np.ndarray, scores: np.ndarray) -> Outputs:
    """What a caller gets where the network says this."""
    raw = {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}
    return run_steps(AFTER, raw, {"image": (len(boxes), SIZE, SIZE, 3)})


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of one box with each of the others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), -1)
    return shared / (np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], -1) - shared)


Found = list[tuple[float, int, np.ndarray]]  # score, picture, box


def by_class(outputs: Outputs) -> list[Found]:
    """What was found, by class."""
    found: list[Found] = [[] for _ in KINDS]
    for picture, count in enumerate(outputs["count"]):
        for at in range(count):
            kind, score = outputs["classes"][picture, at], outputs["scores"][picture, at]
            found[kind].append((float(score), picture, outputs["boxes"][picture, at]))
    return found


def average_precision(found: Found, wanted: list[list[np.ndarray]]) -> float:
    """Area under precision over recall of one class; ``wanted``: its boxes by picture."""
    total = sum(map(len, wanted))
    taken = [np.zeros(len(boxes), bool) for boxes in wanted]
    right = np.zeros(len(found))
    for at, (_, picture, box) in enumerate(sorted(found, key=lambda item: -item[0])):
        if not len(wanted[picture]):
            continue
        overlaps = iou(box, np.stack(wanted[picture]))
        best = int(overlaps.argmax())
        if overlaps[best] >= 0.5 and not taken[picture][best]:
            taken[picture][best], right[at] = True, 1.0
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(found) + 1))[::-1])[::-1]
    return float((precision * right).sum() / total)


def mean_average_precision(outputs: Outputs, all_scenes: list[Scene]) -> float:
    """Over the classes, at an intersection over union of 0.5."""
    found = by_class(outputs)
    return float(
        np.mean(
            [
                average_precision(found[kind], [[box for k, box in scene if k == kind] for scene in all_scenes])
                for kind in range(len(KINDS))
            ]
        )
    )


def evaluate(predict: Predict, test: Any) -> dict[str, float]:
    inputs, all_scenes = test
    return {MAP.name: mean_average_precision(in_chunks(predict, inputs), all_scenes)}


def _loss(answer: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    boxes, scores = answer
    kinds = target[..., 0].long()
    there = kinds > 0
    return functional.cross_entropy(scores.flatten(0, 1), kinds.flatten()) * 4 + functional.smooth_l1_loss(
        boxes[there], target[..., 1:][there]
    )


def train(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, known = scenes(2500, rng)
    prepared = run_steps(BEFORE, {"image": images}, {})["image"]
    network = fit(Detector(), np.ascontiguousarray(prepared), encoded(known), loss=_loss, epochs=5, rate=8e-3, rows=50)
    calibration, (test, asked) = scenes(200, rng)[0], scenes(1000, held_out_rows(held_out))
    prior = np.zeros((len(test), CELLS, 4))
    return Trained(
        module=network,
        example={"image": test[:2]},
        outputs=("boxes", "scores"),
        data=Data(calibration={"image": calibration}, test=({"image": test}, asked)),
        evaluate=evaluate,
        baseline=mean_average_precision(decoded(prior, prior), asked),
        decide=lambda outputs, _: outputs["scores"].argmax(-1),
        preprocessing=BEFORE,
        postprocessing=AFTER,
        axes={"image": "NHWC"},
    )


CASES = (
    Case(
        name="detector",
        item=12,
        network="four conv layers, stride 8, a box and four scores a cell of 6x6, on 48x48x3",
        data="one to three of disc, square, triangle that do not touch, any colour, noise 0.08",
        parameters=61_208,
        metric=MAP,
        rule="a box of mean size in every cell, for every class",
        baseline=0.0,
        floor=0.70,
        ceiling=0.985,
        forms={"onnx": "int8", "tflite": "int8"},
        train=train,
        gates=(MinMetric(MAP.name, at_least=0.85), MaxDrop(MAP.name, points=1.0)),
    ),
)
