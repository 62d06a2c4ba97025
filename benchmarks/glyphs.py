"""A task of our own: digits as a hand draws them, with noise and something in front; as many rows as are asked for.

Each class has one or two skeletons of points. A row is a skeleton bent by slow waves, turned, sheared, scaled and
moved, drawn with a pen of its own width and darkness, then covered by noise and often by a grey patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 16  # pixels
CLASSES = 10
POINTS = 56  # along a skeleton: less than a pixel apart
ROWS_AT_ONCE = 500  # bounds memory
WAVES = 3  # of a bent skeleton
_LINES = {  # corners as x,y in hundredths of a box, y downwards
    0: ("50,5 20,20 12,50 20,82 50,95 80,82 88,50 80,20 50,5",),
    1: ("35,22 55,5 55,95",
        "50,5 50,95"),
    2: ("18,25 35,6 65,6 82,27 70,50 20,93 85,93",),
    3: ("20,15 50,4 78,20 72,40 45,48 78,58 80,82 50,96 18,85",),
    4: ("68,95 68,5 15,65 88,65",
        "25,5 20,50 80,50 80,10 75,95"),
    5: ("80,6 28,6 24,46 60,40 83,62 72,90 40,96 17,85",),
    6: ("72,6 35,28 18,62 30,92 62,94 80,72 62,50 22,62",),
    7: ("15,7 85,7 60,45 42,95",
        "15,12 82,7 55,50 30,50 72,50 40,95"),
    8: ("50,48 22,28 50,5 78,28 50,48 18,72 50,96 82,72 50,48",),
    9: ("78,32 50,50 22,32 42,7 75,12 78,40 68,95",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """Some of the task.

    Attributes:
        images: float32 [N, 1, 16, 16], 0 to 1.
        labels: int64 [N], 0 to 9.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_glyphs(rows: int, rng: np.random.Generator) -> Glyphs:
    """So many rows; the same generator gives the same ones."""
    parts = [_drawn(min(ROWS_AT_ONCE, rows - at), rng) for at in range(0, rows, ROWS_AT_ONCE)]
    return Glyphs(images=np.concatenate([p.images for p in parts]), labels=np.concatenate([p.labels for p in parts]))


def _drawn(rows: int, rng: np.random.Generator) -> Glyphs:
    labels = rng.integers(0, CLASSES, rows)
    hands = [skeletons[rng.integers(len(skeletons))] for skeletons in (_SKELETONS[int(label)] for label in labels)]
    pens = _bent(np.stack(hands), rng)  # [rows, points, xy], in pixels
    pixels = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2).astype(np.float32)
    apart = (pens**2).sum(-1)[:, :, None] - 2.0 * pens @ pixels.T + (pixels**2).sum(-1)
    nearest = np.sqrt(np.maximum(apart.min(axis=1), 0.0))
    width, ink = rng.uniform(0.3, 1.0, (rows, 1)), rng.uniform(0.55, 1.0, (rows, 1))
    images = (ink * np.clip(1.5 + width - nearest, 0.0, 1.0)).reshape(rows, SIDE, SIDE)
    _cover(images, rng)
    images += rng.uniform(0.02, 0.3, (rows, 1, 1)) * rng.standard_normal(images.shape)
    return Glyphs(images=np.clip(images, 0.0, 1.0)[:, None].astype(np.float32), labels=labels.astype(np.int64))


def _bent(points: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    rows = len(points)
    along = np.linspace(0.0, 1.0, POINTS)
    bent = points - 0.5
    for wave in range(1, WAVES + 1):
        size = rng.normal(0.0, 0.045 / wave, (rows, 1, 2))
        bent = bent + size * np.sin(2.0 * np.pi * wave * along[None, :, None] + rng.uniform(0, 2 * np.pi, (rows, 1, 2)))
    turn, shear = rng.normal(0.0, 0.16, rows), rng.normal(0.0, 0.18, rows)
    wide, high = rng.uniform(0.5, 0.8, rows) * SIDE, rng.uniform(0.62, 0.88, rows) * SIDE
    cosine, sine = np.cos(turn), np.sin(turn)
    matrix = np.stack([wide * cosine, wide * sine, high * (shear * cosine - sine), high * (shear * sine + cosine)])
    moved = bent @ matrix.T.reshape(rows, 2, 2)
    placed = moved + (SIDE - 1) / 2 + rng.uniform(-1.2, 1.2, (rows, 1, 2))
    return np.asarray(placed, np.float32)


def _cover(images: NDArray[np.float64], rng: np.random.Generator) -> None:
    """A grey patch in front of half of them, in place."""
    rows = len(images)
    size = rng.integers(2, 7, (rows, 2)) * (rng.random((rows, 1)) < 0.5)
    corner = (rng.random((rows, 2)) * (SIDE - size + 1)).astype(int)
    at = np.arange(SIDE)
    inside = (at >= corner[..., None]) & (at < (corner + size)[..., None])
    patch = inside[:, 0, :, None] & inside[:, 1, None, :]
    np.copyto(images, np.broadcast_to(rng.random((rows, 1, 1)), images.shape), where=patch)


def _skeleton(corners: str) -> NDArray[np.float32]:
    """Points at equal distances on a rounded line through these. float32 [POINTS, 2]."""
    line = np.array([corner.split(",") for corner in corners.split()], float) / 100.0
    for _ in range(2):  # Chaikin's corner cutting
        cut = np.stack([0.75 * line[:-1] + 0.25 * line[1:], 0.25 * line[:-1] + 0.75 * line[1:]], axis=1)
        line = np.concatenate([line[:1], cut.reshape(-1, 2), line[-1:]])
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    at = np.linspace(0.0, length[-1], POINTS)
    return np.stack([np.interp(at, length, line[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32)


_SKELETONS = {label: [_skeleton(corners) for corners in lines] for label, lines in _LINES.items()}
