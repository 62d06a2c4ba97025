"""Item 12: a one-stage detector on pictures of up to three shapes; boxes and classes, decoded and thinned in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from networks.case import Case, Metric, Outputs, Predict, Trained, fit, in_chunks
from networks.images import inside
from outrider_exporters import Data

MAP = Metric(name="mAP at IoU 0.5")
KINDS = ("disc", "square", "triangle")
SIZE, GRID = 48, 6
CELLS = GRID * GRID
MEAN_SIDE = 0.3
Scene = list[tuple[int, np.ndarray]]  # class, box as x0, y0, x1, y1 in 0..1


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
        scene.append((kind, np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE))
    noisy = image + 0.08 * rng.standard_normal(image.shape)
    return np.clip(noisy, 0.0, 1.0).astype(np.float32), scene


def encoded(all_scenes: list[Scene]) -> np.ndarray:
    """float32 [N, 36, 5]: class + 1 (0: nothing) and the box as the network gives it, in the cell of its middle."""
    targets = np.zeros((len(all_scenes), CELLS, 5), np.float32)
    for target, scene in zip(targets, all_scenes, strict=True):
        for kind, (x0, y0, x1, y1) in scene:
            x, y = (x0 + x1) / 2 * GRID, (y0 + y1) / 2 * GRID
            offset = np.clip([x % 1, y % 1], 0.02, 0.98)
            sides = np.log(np.array([x1 - x0, y1 - y0]) / MEAN_SIDE)
            target[int(y) * GRID + int(x)] = [kind + 1, *np.log(offset / (1 - offset)), *sides]
    return targets


def decode(boxes: np.ndarray) -> np.ndarray:
    """The network's boxes [N, 36, 4] as x0, y0, x1, y1 in 0..1."""
    rows, columns = np.divmod(np.arange(CELLS), GRID)
    middle = (np.stack([columns, rows], -1) + 1.0 / (1.0 + np.exp(-boxes[..., :2]))) / GRID
    half = np.exp(np.clip(boxes[..., 2:], -4, 4)) * MEAN_SIDE / 2
    return np.concatenate([middle - half, middle + half], -1)


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of one box with each of the others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), -1)
    return shared / (np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], -1) - shared)


def suppress(boxes: np.ndarray, scores: np.ndarray, *, overlap: float = 0.45) -> list[int]:
    """Which boxes stay, best first: each is dropped that overlaps a better one."""
    kept: list[int] = []
    for at in np.argsort(-scores, kind="stable"):
        if not kept or iou(boxes[at], boxes[kept]).max() <= overlap:
            kept.append(int(at))
    return kept


Found = list[tuple[float, int, np.ndarray]]  # score, picture, box


def detections(boxes: np.ndarray, scores: np.ndarray, *, least: float = 0.05) -> list[Found]:
    """What is found, by class: decoded, above a least score, each class thinned by itself."""
    corners = decode(boxes)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    chances = odds / odds.sum(-1, keepdims=True)
    found: list[Found] = [[] for _ in KINDS]
    for picture in range(len(boxes)):
        for kind in range(len(KINDS)):
            chance = chances[picture, :, kind + 1]
            (cells,) = np.nonzero(chance > least)
            for at in suppress(corners[picture, cells], chance[cells]):
                found[kind].append((float(chance[cells[at]]), picture, corners[picture, cells[at]]))
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


def mean_average_precision(found: list[Found], all_scenes: list[Scene]) -> float:
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
    outputs: Outputs = in_chunks(predict, inputs)
    return {MAP.name: mean_average_precision(detections(outputs["boxes"], outputs["scores"]), all_scenes)}


def _loss(answer: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    boxes, scores = answer
    kinds = target[..., 0].long()
    there = kinds > 0
    return functional.cross_entropy(scores.flatten(0, 1), kinds.flatten()) * 4 + functional.smooth_l1_loss(
        boxes[there], target[..., 1:][there]
    )


def train() -> Trained:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, known = scenes(2500, rng)
    network = fit(Detector(), images, encoded(known), loss=_loss, epochs=5, rate=8e-3, rows=50)
    calibration, (test, asked) = scenes(200, rng)[0], scenes(1000, rng)
    prior = np.zeros((len(test), CELLS, 4))
    return Trained(
        module=network,
        example={"image": test[:2]},
        outputs=("boxes", "scores"),
        data=Data(calibration={"image": calibration}, test=({"image": test}, asked)),
        evaluate=evaluate,
        baseline=mean_average_precision(detections(prior, prior), asked),
        decide=lambda outputs, _: outputs["scores"].argmax(-1),
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
    ),
)
