"""Of overlapping boxes the best one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs, spec_named
from outrider_runtimes.processing.boxes import CORNERS, need_boxes
from outrider_runtimes.processing.fields import Flag, Name, Number, StoredStep, Whole
from outrider_runtimes.processing.specs import need_dtype, replaced
from outrider_runtimes.tensors import Array, TensorSpec

MAX_DETECTIONS = 1000
MAX_CANDIDATES = 10_000
BLOCK = 128  # boxes whose overlaps are worked out at once


@dataclass(frozen=True, kw_only=True)
class Suppression(StoredStep):
    """Non-maximum suppression, each class by itself.

    In each row the pairs of box and class with a score above ``score_threshold`` are taken best first; where two scores
    are level the lower box comes first, then the lower class. Only the best ``candidates`` are looked at. A pair is
    dropped when its box overlaps that of a kept pair of its class by more than ``iou_threshold``: the area of the
    intersection over the area of the union. Boxes with NaN or infinity are dropped.

    Attributes:
        boxes: float32 [N, P, 4], corners; becomes [N, max_detections, 4], zeros after the last.
        scores: float32 [N, P, C], of each class; becomes [N, max_detections], zeros after the last.
        classes: the name of int64 [N, max_detections]: numbers of classes, -1 after the last.
        count: the name of int64 [N]: how many there are.
        iou_threshold: above it, boxes are of one thing.
        score_threshold: at it or below, a score is nothing.
        max_detections: of all classes together; the best.
        candidates: see above.
        first_class: scores before it are of nothing (background) and are left out; classes are counted from it.
        class_aware: whether a box can only be dropped for one of its own class.
        multi_label: whether a box may stand for several classes; else only for its best one.
    """

    kind: ClassVar[str] = "suppression"
    boxes: Name = "boxes"
    scores: Name = "scores"
    classes: Name = "classes"
    count: Name = "count"
    iou_threshold: Annotated[float, Number(0.0, 1.0)] = 0.5
    score_threshold: Annotated[float, Number(0.0, 1.0)] = 0.05
    max_detections: Annotated[int, Whole(1, MAX_DETECTIONS)] = 100
    candidates: Annotated[int, Whole(1, MAX_CANDIDATES)] = 1000
    first_class: Annotated[int, Whole(0, 1)] = 0
    class_aware: Flag = True
    multi_label: Flag = True

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        boxes, scores = need_boxes(specs, self.boxes), spec_named(specs, self.scores)
        need_dtype(scores, "float32")
        right = scores.batched and len(scores.shape) == 3 and scores.shape[1] == boxes.shape[1]
        kinds = scores.shape[-1] if right else None
        if kinds is None or kinds <= self.first_class:
            wanted = f"[N, {boxes.shape[1]}, more than {self.first_class}]"
            raise FormatError(f"{self.scores!r} has shape {list(scores.shape)}, expected {wanted}")
        rows, most = boxes.shape[0], self.max_detections
        best = replace(scores, shape=(rows, most), axes="NK")
        bounds = (-1.0, kinds - self.first_class - 1.0)
        made = replaced(specs, self.boxes, {self.boxes: replace(boxes, shape=(rows, most, CORNERS), axes="NKB")})
        return replaced(
            made,
            self.scores,
            {
                self.scores: best,
                self.classes: TensorSpec(name=self.classes, dtype="int64", shape=(rows, most), axes="NK", range=bounds),
                self.count: TensorSpec(
                    name=self.count, dtype="int64", shape=(rows,), axes="N", range=(0.0, float(most))
                ),
            },
        )

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        boxes, scores = tensors[self.boxes], tensors[self.scores][..., self.first_class :]
        rows, most = len(boxes), self.max_detections
        made_boxes = np.zeros((rows, most, CORNERS), np.float32)
        made_scores = np.zeros((rows, most), np.float32)
        classes, count = np.full((rows, most), -1, np.int64), np.zeros(rows, np.int64)
        for row in range(rows):
            which, kinds = self._kept(boxes[row], scores[row])
            found = len(which)
            count[row] = found
            made_boxes[row, :found], classes[row, :found] = boxes[row, which], kinds
            made_scores[row, :found] = scores[row, which, kinds]
        made = replaced(tensors, self.boxes, {self.boxes: made_boxes})
        return replaced(made, self.scores, {self.scores: made_scores, self.classes: classes, self.count: count})

    def _kept(self, boxes: Array, scores: Array) -> tuple[Array, Array]:
        """Of one row: the numbers of the boxes that stay and of their classes, best first."""
        above = np.asarray(scores > self.score_threshold)
        if not self.multi_label:
            above &= np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, np.newaxis]
        above[~np.isfinite(boxes).all(axis=1)] = False
        pairs = np.flatnonzero(above)
        values = scores.reshape(-1)[pairs]
        if len(pairs) > self.candidates:  # sort no more than needed; what is level with the last stays for the sort
            least = np.partition(values, -self.candidates)[-self.candidates]
            pairs, values = pairs[values >= least], values[values >= least]
        order = np.argsort(-values, kind="stable")[: self.candidates]
        which, kinds = np.divmod(pairs[order], scores.shape[1])
        kept = _greedy(boxes[which], kinds if self.class_aware else np.zeros_like(kinds), self)
        return which[kept], kinds[kept]


def _greedy(boxes: Array, kinds: Array, step: Suppression) -> list[int]:
    """Which of some boxes stay, best first, where they come best first.

    Overlaps are worked out for a block of boxes at a time: with all that were kept before it, and among themselves.
    """
    kept: list[int] = []
    for start in range(0, len(boxes), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(boxes)))
        if kept:
            block = block[~_overlapping(boxes, kinds, block, np.array(kept), step.iou_threshold).any(axis=1)]
        among = _overlapping(boxes, kinds, block, block, step.iou_threshold)
        stays = np.ones(len(block), bool)
        for position, number in enumerate(block):
            if stays[position]:
                kept.append(int(number))
                if len(kept) == step.max_detections:
                    return kept
                stays &= ~among[position]
    return kept


def _overlapping(boxes: Array, kinds: Array, some: Array, others: Array, threshold: float) -> Array:
    """bool [some, others]: whether two boxes are of one class and overlap by more than the threshold."""
    one, other = boxes[some][:, np.newaxis], boxes[others]
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    width, height = np.moveaxis(np.maximum(high - low, np.float32(0.0)), -1, 0)
    shared = width * height
    union = _area(one) + _area(other) - shared
    same: Array = kinds[some][:, np.newaxis] == kinds[others]
    same &= shared > np.float32(threshold) * union
    return same


def _area(boxes: Array) -> Array:
    area: Array = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return area
