"""Synthetic sounds as the features that small audio networks take."""

from __future__ import annotations

from functools import cache

import numpy as np

from networks.case import JUDGED, held_out_rows
from networks.images import Split

RATE_HZ = 4000
FRAMES, HOP, WINDOW = 49, 80, 160


def log_bands(waves: np.ndarray, bands: int) -> np.ndarray:
    """Waves [N, samples] as the logarithm of their energy in overlapping bands: float32 [N, 49, bands]."""
    starts = np.arange(FRAMES) * HOP
    frames = waves[:, starts[:, np.newaxis] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=-1)) ** 2
    bins = np.arange(power.shape[-1])
    centres = np.geomspace(3, power.shape[-1] - 4, bands)
    widths = np.maximum(2.0, centres * 0.25)
    filters = np.maximum(0.0, 1.0 - np.abs(bins[:, np.newaxis] - centres) / widths)
    return np.log(power @ filters + 1e-2).astype(np.float32)


def _word(word: int, rng: np.random.Generator) -> np.ndarray:
    """Three tones one after the other; the twelve words differ in the order of their pitches, said by any voice."""
    pitches = np.random.default_rng(1000 + word).choice([300.0, 450.0, 650.0, 900.0, 1250.0], 3)
    pitches = pitches * rng.uniform(0.85, 1.15)
    samples = HOP * (FRAMES - 1) + WINDOW
    length = rng.uniform(0.5, 0.95) * samples
    begin = rng.uniform(0, samples - length)
    at = (np.arange(samples) - begin) / length * 3.0
    pitch = np.interp(at, [0.5, 1.5, 2.5], pitches)
    phase = 2.0 * np.pi * np.cumsum(pitch) / RATE_HZ
    loud = np.where((at > 0) & (at < 3), np.sin(np.pi * np.clip(at / 3.0, 0, 1)) ** 0.5, 0.0)
    return loud * (np.sin(phase) + 0.4 * np.sin(2 * phase))


@cache
def words(*, train: int, test: int, noise: float, seed: int = 0, held_out: int = JUDGED) -> Split:
    """Twelve spoken "words" in noise: float32 [N, 1, 49, 10] and their numbers."""
    learned = np.random.default_rng(seed)
    parts = []
    for rng, count in ((learned, train), (learned, 200), (held_out_rows(held_out), test)):
        labels = rng.integers(0, 12, count)
        waves = np.stack([_word(label, rng) for label in labels])
        levels = noise * rng.uniform(0.5, 2.0, (count, 1))
        features = log_bands(waves + levels * rng.standard_normal(waves.shape), 10)
        parts.append(((features[:, np.newaxis] / 3.0).astype(np.float32), labels.astype(np.int64)))
    return Split(train=parts[0], calibration=parts[1][0], test=parts[2])


@cache
def machine(*, train: int, test: int, seed: int = 0, held_out: int = JUDGED) -> Split:
    """Five frames of 128 bands of a running machine, float32 [N, 640]; in the test half is broken (1), half not (0).

    Speed, load and phase of the frames vary; a broken one has a harmonic that does not belong there.
    """
    learned = np.random.default_rng(seed)
    parts = []
    for rng, count, broken in ((learned, train, 0.0), (learned, 200, 0.0), (held_out_rows(held_out), test, 0.5)):
        labels = (rng.uniform(size=count) < broken).astype(np.int64)
        parts.append((_spectra(labels, rng), labels))
    return Split(train=parts[0], calibration=parts[1][0], test=parts[2])


def _spectra(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows = len(labels)
    band, frame = np.arange(128), np.arange(5)[:, np.newaxis]
    speed = rng.uniform(14.0, 20.0, (rows, 1, 1)) + rng.uniform(-0.4, 0.4, (rows, 1, 1)) * frame
    load = rng.uniform(0.5, 1.5, (rows, 1, 1))
    level = np.zeros((rows, 5, 128))
    for harmonic in range(1, 6):
        level += load / harmonic**0.5 * np.exp(-(((band - harmonic * speed) / 2.5) ** 2))
    extra = rng.uniform(0.25, 0.9, (rows, 1, 1)) * labels[:, np.newaxis, np.newaxis]
    level += extra * np.exp(-(((band - rng.uniform(1.3, 3.7, (rows, 1, 1)) * speed) / 2.5) ** 2))
    level += 0.15 * rng.standard_normal(level.shape)
    return level.reshape(rows, 640).astype(np.float32)
