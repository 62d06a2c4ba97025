"""scikit-learn's handwritten digits, split by source image, and the stream that the device sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the data.

    Attributes:
        images: float32 [N, 1, 8, 8] in 0..1.
        labels: int64 [N].
    """

    images: Images
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Three parts that share no source image."""

    train: Part
    calibration: Part
    test: Part


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """How far an image is moved, turned and blurred by noise, at the most.

    Attributes:
        shift_px: shift along each axis, uniform in plus or minus this.
        rotation_deg: rotation, uniform in plus or minus this.
        noise: standard deviation of the added noise is uniform from 0 to this.
    """

    shift_px: float
    rotation_deg: float
    noise: float


GENTLE = Disturbance(shift_px=0.5, rotation_deg=10.0, noise=0.05)
HARSH = Disturbance(shift_px=1.25, rotation_deg=25.0, noise=0.2)
STREAM = Disturbance(shift_px=1.0, rotation_deg=20.0, noise=0.15)


def load_digits(seed: int) -> Digits:
    """1,797 images: 60 % train, 15 % calibration, 25 % test."""
    from sklearn.datasets import load_digits as load

    raw = load()
    images = (raw.images / 16.0).astype(np.float32)[:, np.newaxis]
    labels = raw.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    first, second = int(0.60 * len(order)), int(0.75 * len(order))
    parts = [
        Part(images=images[chosen], labels=labels[chosen])
        for chosen in (order[:first], order[first:second], order[second:])
    ]
    return Digits(train=parts[0], calibration=parts[1], test=parts[2])


def disturbed(part: Part, count: int | None, how: Disturbance, rng: np.random.Generator) -> Part:
    """Images of a part, each shifted, rotated and noised by its own random amount.

    Args:
        count: so many, drawn with replacement; None takes each once, in order.
    """
    from scipy import ndimage

    chosen = np.arange(len(part.labels)) if count is None else rng.integers(0, len(part.labels), count)
    count = len(chosen)
    angles = np.deg2rad(rng.uniform(-how.rotation_deg, how.rotation_deg, count))
    shifts = rng.uniform(-how.shift_px, how.shift_px, (count, 2))
    levels = rng.uniform(0.0, how.noise, count)
    out = np.empty((count, 1, 8, 8), np.float32)
    for row, source in enumerate(chosen):
        matrix, offset = _affine(angles[row], shifts[row])
        out[row, 0] = ndimage.affine_transform(part.images[source, 0], matrix, offset, order=1)
    out += levels[:, np.newaxis, np.newaxis, np.newaxis] * rng.standard_normal(out.shape)
    return Part(images=np.clip(out, 0.0, 1.0).astype(np.float32), labels=part.labels[chosen])


def _affine(angle: float, shift: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rotation about the middle of an 8x8 image, then a shift."""
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    middle = np.array([3.5, 3.5])
    return matrix, middle - matrix @ (middle + shift)
