"""What a detector says of boxes, as corners in pixels: x0, y0, x1, y1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs, spec_named
from outrider_runtimes.processing.fields import Axes, Choice, Many, Name, Number, Side, StoredStep, Whole
from outrider_runtimes.processing.geometry import FITS, caller_sides, placed
from outrider_runtimes.processing.scores import sigmoid
from outrider_runtimes.processing.specs import image_size, need_dtype, need_letters
from outrider_runtimes.tensors import Array, TensorSpec

MAX_LEVELS = 16
MAX_BOXES = 2**17
MAX_ANCHORS = 2**15  # they stand in the manifest, four numbers each
MAX_EXPONENT = 10.0  # of a side: e^10 strides are beyond any image, and no overflow
CORNERS = 4

Shares = Annotated[tuple[float, ...], Many(Number(1e-6, 1e3), CORNERS, CORNERS)]


def need_boxes(specs: Specs, name: str, count: int | None = None) -> TensorSpec:
    """The tensor of that name, which must be float32 [N, boxes, 4]. Raises FormatError."""
    spec = spec_named(specs, name)
    need_dtype(spec, "float32")
    shape = spec.shape
    right = spec.batched and len(shape) == 3 and shape[1] and shape[2] == CORNERS and count in (None, shape[1])
    if not right or shape[1] is None or shape[1] > MAX_BOXES:
        wanted = f"1 to {MAX_BOXES}" if count is None else count
        raise FormatError(f"{name!r} has shape {list(shape)} and axes {spec.axes!r}, expected [N, {wanted}, {CORNERS}]")
    return spec


@dataclass(frozen=True, kw_only=True)
class GridBoxes(StoredStep):
    """Boxes of a detector without anchors: one a cell of a grid, or of several grids one after the other.

    A grid of stride ``s`` has ``ceil(height / s)`` rows and ``ceil(width / s)`` columns, its cells come row by row.
    With ``side(v) = v * s * side_scale``, or ``exp(v) * s * side_scale`` where ``sides`` is ``exp``:

    - ``ltrb``: four distances from the middle of the cell to the left, the top, the right and the bottom, by ``side``;
    - ``cxcywh``: the middle is ``(column + f(x), row + f(y)) * s``, where ``f`` is nothing or the sigmoid; width and
      height by ``side``.

    An exponent is held within -10 and 10.

    Attributes:
        tensor: float32 [N, cells, 4]; becomes corners in pixels of the network's image.
        height, width: of the network's image.
        strides: of the grids, in pixels.
        form: ``ltrb`` or ``cxcywh``.
        offsets: ``linear`` or ``sigmoid``: ``f`` above; ``linear`` for ``ltrb``.
        sides: ``linear`` or ``exp``.
        side_scale: see above.
    """

    kind: ClassVar[str] = "grid_boxes"
    tensor: Name
    height: Side
    width: Side
    strides: Annotated[tuple[int, ...], Many(Whole(1, 1024), 1, MAX_LEVELS)]
    form: Annotated[str, Choice(("ltrb", "cxcywh"))]
    offsets: Annotated[str, Choice(("linear", "sigmoid"))] = "linear"
    sides: Annotated[str, Choice(("linear", "exp"))] = "linear"
    side_scale: Annotated[float, Number(1e-6, 1e6)] = 1.0

    def check(self) -> None:
        """See ``StoredStep``."""
        if self.form == "ltrb" and self.offsets != "linear":
            raise FormatError(f"offsets: {self.offsets} has no meaning for ltrb, which starts from the cell's middle")
        if sum(rows * columns for rows, columns in self._grids()) > MAX_BOXES:
            raise FormatError(f"strides: more than {MAX_BOXES} cells")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = need_boxes(specs, self.tensor, sum(rows * columns for rows, columns in self._grids()))
        return {**specs, self.tensor: replace(spec, range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        raw = tensors[self.tensor]
        cells, strides = self._cells
        if self.form == "ltrb":
            sides = self._sides(raw) * strides
            middles = (cells + np.float32(0.5)) * strides
            made = np.concatenate([middles - sides[..., :2], middles + sides[..., 2:]], -1)
        else:
            offsets = raw[..., :2] if self.offsets == "linear" else sigmoid(raw[..., :2])
            middles = (cells + offsets) * strides
            made = _corners(middles, self._sides(raw[..., 2:]) * strides)
        return {**tensors, self.tensor: made}

    def _sides(self, raw: Array) -> Array:
        lengths = np.exp(np.clip(raw, -MAX_EXPONENT, MAX_EXPONENT)) if self.sides == "exp" else raw
        return lengths * np.float32(self.side_scale)

    def _grids(self) -> list[tuple[int, int]]:
        return [(-(-self.height // stride), -(-self.width // stride)) for stride in self.strides]

    @cached_property
    def _cells(self) -> tuple[Array, Array]:
        """float32 [cells, 2]: column and row; float32 [cells, 1]: stride."""
        cells, strides = [], []
        for (rows, columns), stride in zip(self._grids(), self.strides, strict=True):
            row, column = np.divmod(np.arange(rows * columns), columns)
            cells.append(np.stack([column, row], -1))
            strides.append(np.full((rows * columns, 1), stride))
        return np.concatenate(cells).astype(np.float32), np.concatenate(strides).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class AnchorBoxes(StoredStep):
    """Boxes of a detector with anchors, as in SSD.

    ``middle = anchor's middle + variance * (x, y) * anchor's size``, ``size = exp(variance * (w, h)) * anchor's size``.
    An exponent is held within -10 and 10.

    Attributes:
        tensor: float32 [N, anchors, 4]; becomes corners in pixels of the network's image.
        anchors: of each: the middle's x and y, width and height, in pixels of the network's image.
        variances: of x, y, w and h.
        order: of the tensor's four: ``xywh`` or ``yxhw``.
    """

    kind: ClassVar[str] = "anchor_boxes"
    tensor: Name
    anchors: Annotated[tuple[tuple[float, ...], ...], Many(Many(Number(-1e5, 1e5), CORNERS, CORNERS), 1, MAX_ANCHORS)]
    variances: Shares = (0.1, 0.1, 0.2, 0.2)
    order: Annotated[str, Choice(("xywh", "yxhw"))] = "xywh"

    def check(self) -> None:
        """See ``StoredStep``."""
        if any(anchor[2] <= 0 or anchor[3] <= 0 for anchor in self.anchors):
            raise FormatError("anchors: width and height must be above 0")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = need_boxes(specs, self.tensor, len(self.anchors))
        return {**specs, self.tensor: replace(spec, range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        raw = tensors[self.tensor]
        if self.order == "yxhw":
            raw = raw[..., [1, 0, 3, 2]]
        anchors, variances = self._tables
        scaled = raw * variances
        middles = anchors[:, :2] + scaled[..., :2] * anchors[:, 2:]
        sizes = np.exp(np.clip(scaled[..., 2:], -MAX_EXPONENT, MAX_EXPONENT)) * anchors[:, 2:]
        return {**tensors, self.tensor: _corners(middles, sizes)}

    @cached_property
    def _tables(self) -> tuple[Array, Array]:
        return np.array(self.anchors, np.float32), np.array(self.variances, np.float32)


@dataclass(frozen=True, kw_only=True)
class CornerBoxes(StoredStep):
    """Boxes that a network decodes itself, in another form or unit, as corners in pixels.

    Attributes:
        tensor: float32 [N, boxes, 4].
        form: ``xyxy`` or ``yxyx`` (two corners), ``cxcywh`` (middle and size) or ``xywh`` (first corner and size).
        x_scale, y_scale: pixels of the network's image a unit: its width and height where boxes are in 0 to 1.
    """

    kind: ClassVar[str] = "corner_boxes"
    tensor: Name
    form: Annotated[str, Choice(("xyxy", "yxyx", "cxcywh", "xywh"))]
    x_scale: Annotated[float, Number(1e-6, 1e6)] = 1.0
    y_scale: Annotated[float, Number(1e-6, 1e6)] = 1.0

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        return {**specs, self.tensor: replace(need_boxes(specs, self.tensor), range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        raw = tensors[self.tensor]
        if self.form == "yxyx":
            raw = raw[..., [1, 0, 3, 2]]
        raw = raw * np.array([self.x_scale, self.y_scale] * 2, np.float32)
        if self.form == "cxcywh":
            raw = _corners(raw[..., :2], raw[..., 2:])
        elif self.form == "xywh":
            raw = np.concatenate([raw[..., :2], raw[..., :2] + raw[..., 2:]], -1)
        return {**tensors, self.tensor: raw}


def _corners(middles: Array, sizes: Array) -> Array:
    half = sizes * np.float32(0.5)
    return np.concatenate([middles - half, middles + half], -1)


@dataclass(frozen=True, kw_only=True)
class BoxesToImage(StoredStep):
    """Boxes from the network's pixels to those of the caller's image, and cut off at its edges.

    Attributes:
        tensor: float32 [N, boxes, 4], corners.
        image: the caller's image.
        height, width: of the network's image.
        axes: the caller's image's.
        fit: how the image was brought to the network's size: ``letterbox`` (Letterbox) or ``stretch`` (Resize).
    """

    kind: ClassVar[str] = "boxes_to_image"
    tensor: Name
    image: Name
    height: Side
    width: Side
    axes: Axes = "NHWC"
    fit: Annotated[str, Choice(FITS)] = "letterbox"

    def check(self) -> None:
        """See ``StoredStep``."""
        need_letters(self.axes, "HW")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = need_boxes(specs, self.tensor)
        caller_sides(callers, self.image, self.axes)
        return {**specs, self.tensor: replace(spec, range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        height, width = image_size(shapes[self.image], self.axes, self.image)
        place = placed((height, width), (self.height, self.width), self.fit)
        start = np.array([place.left, place.top] * 2, np.float32)
        scale = np.array([width / place.width, height / place.height] * 2, np.float32)
        edges = np.array([width, height] * 2, np.float32)
        return {**tensors, self.tensor: np.clip((tensors[self.tensor] - start) * scale, np.float32(0.0), edges)}
