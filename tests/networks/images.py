"""Images with their classes: scikit-learn's digits drawn larger, and shapes out of a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from networks.case import JUDGED, VALIDATION, held_out_rows


@dataclass(frozen=True, kw_only=True)
class Split:
    """Three parts that share no source: images float32 [N, C, H, W] and int64 [N] classes, calibration images alone."""

    train: tuple[np.ndarray, np.ndarray]
    calibration: np.ndarray
    test: tuple[np.ndarray, np.ndarray]


@cache
def digits(*, train: int, test: int, noise: float, size: int = 28, seed: int = 0, held_out: int = JUDGED) -> Split:
    """Handwritten digits of 8x8 drawn at another size, each turned, scaled, moved and noised at random."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    rng = np.random.default_rng(seed)
    learned, calibrating, validating, judging = np.split(rng.permutation(len(raw.target)), [1000, 1200, 1450])
    last = validating if held_out == VALIDATION else judging
    parts = []
    for chosen, count in ((learned, train), (calibrating, 200), (last, test)):
        rng = held_out_rows(held_out) if chosen is last else rng
        drawn = rng.choice(chosen, count)
        images = np.stack([_drawn(image, size, rng) for image in raw.images[drawn] / 16.0])
        images = images + noise * rng.standard_normal(images.shape)
        parts.append((images[:, np.newaxis].astype(np.float32), raw.target[drawn].astype(np.int64)))
    return Split(train=parts[0], calibration=parts[1][0], test=parts[2])


def _drawn(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    from scipy import ndimage

    angle = np.deg2rad(rng.uniform(-20, 20))
    step = 8.0 / size * rng.uniform(0.9, 1.25)
    matrix = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = matrix @ np.full(2, (size - 1) / 2)
    return ndimage.affine_transform(image, matrix, 3.5 - middle + rng.uniform(-0.7, 0.7, 2), (size, size), order=1)


SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar", "moon", "dots", "arrow", "frame")


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points belong to a shape of about unit radius; u to the right, v down."""
    r, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    box = np.maximum(a, b)
    return {
        "disc": r < 0.9,
        "square": box < 0.8,
        "triangle": (v < 0.7) & (v > 2.0 * a - 0.9),
        "cross": (np.minimum(a, b) < 0.25) & (box < 0.9),
        "ring": (r < 0.95) & (r > 0.55),
        "bar": (a < 0.95) & (b < 0.3),
        "moon": (r < 0.95) & (np.hypot(u - 0.5, v) > 0.75),
        "dots": np.hypot(a - 0.55, v) < 0.38,
        "arrow": ((u > 0.1) & (b < 0.9 - u)) | ((u > -0.9) & (u <= 0.1) & (b < 0.22)),
        "frame": (box < 0.85) & (box > 0.5),
    }[shape]


@cache
def shapes(
    *,
    size: int,
    train: int,
    test: int,
    noise: float,
    classes: tuple[str, ...] = SHAPES,
    radius: tuple[float, float] = (0.25, 0.4),
    seed: int = 0,
    held_out: int = JUDGED,
) -> Split:
    """One shape a picture, turned, of any colour, on a slanting background: float32 [N, 3, size, size] in 0..1.

    Args:
        radius: smallest and largest, as a share of the side.
    """
    learned = np.random.default_rng(seed)
    parts = []
    for rng, count in ((learned, train), (learned, 200), (held_out_rows(held_out), test)):
        labels = rng.integers(0, len(classes), count)
        images = np.stack([_picture(classes[label], size, radius, noise, rng) for label in labels])
        parts.append((images, labels.astype(np.int64)))
    return Split(train=parts[0], calibration=parts[1][0], test=parts[2])


def _picture(shape: str, size: int, radius: tuple[float, float], noise: float, rng: np.random.Generator) -> np.ndarray:
    v, u = np.mgrid[0:size, 0:size].astype(np.float32) / size
    r = rng.uniform(*radius)
    x, y = rng.uniform(r, 1 - r, 2)
    angle = rng.uniform(-0.4, 0.4)
    p, q = (u - x) / r, (v - y) / r
    mask = inside(shape, p * np.cos(angle) + q * np.sin(angle), q * np.cos(angle) - p * np.sin(angle))
    slope = rng.uniform(-0.3, 0.3, (3, 2, 1, 1))
    ground = rng.uniform(0.2, 0.8, (3, 1, 1)) + slope[:, 0] * (u - 0.5) + slope[:, 1] * (v - 0.5)
    colour = ground + rng.choice([-1.0, 1.0]) * rng.uniform(0.15, 0.5, (3, 1, 1))
    image = np.where(mask, colour, ground) + noise * rng.standard_normal((3, size, size))
    return np.clip(image, 0.0, 1.0).astype(np.float32)
