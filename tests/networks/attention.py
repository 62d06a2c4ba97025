"""Item 4: one block of multi-head scaled dot-product self-attention."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from networks.case import ACCURACY, JUDGED, Case, Trained, classifier, fit, held_out_rows

WIDTH, INNER, LENGTH, HEADS, KINDS = 768, 2048, 16, 8, 4


class Block(nn.Module):
    """tokens: float32 [N, 16, 768] -> scores: float32 [N, 4], read at the last token.

    softmax(Q K^T / sqrt(d_k)) V written out, then dense 2048; both added to what came in, then normed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))
        self.dense = nn.Linear(WIDTH, KINDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.mix(tokens).reshape(-1, LENGTH, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        weights = functional.softmax(query @ key.transpose(-2, -1) / math.sqrt(WIDTH // HEADS), -1)
        heads = (weights @ value).transpose(1, 2).reshape(-1, LENGTH, WIDTH)
        x = self.first(tokens + self.out(heads))
        x = self.second(x + self.inner(x))
        return self.dense(x[:, -1])


def marked(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen noisy tokens of four kinds, one of which, not the last, bears a mark: its kind is asked for.

    A token has 32 features; a fixed table embeds them, the mark as a 33rd, in 768.
    """
    fixed = np.random.default_rng(7)
    means, table = 0.8 * fixed.standard_normal((KINDS, 32)), fixed.standard_normal((33, WIDTH)) / 6.0
    kinds = rng.integers(0, KINDS, (count, LENGTH))
    where = rng.integers(0, LENGTH - 1, count)
    features = np.zeros((count, LENGTH, 33))
    features[..., :32] = means[kinds] + rng.standard_normal((count, LENGTH, 32))
    features[np.arange(count), where, 32] = 4.0
    return (features @ table).astype(np.float32), kinds[np.arange(count), where]


def train(held_out: int = JUDGED) -> Trained:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    learned, calibration, test = marked(1200, rng), marked(100, rng)[0], marked(2000, held_out_rows(held_out))
    network = fit(Block(), *learned, epochs=1, rate=4e-4, rows=8)
    return classifier(network, learned, calibration, test, name="tokens")


CASES = (
    Case(
        name="attention",
        item=4,
        network="one block of self-attention, d_model 768, 8 heads, inner 2048, sequence 16",
        data="16 noisy tokens of 4 kinds, one of them marked: of which kind is it",
        parameters=5_517_060,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.31,
        floor=0.80,
        ceiling=0.995,
        forms={"onnx": "dynamic", "tflite": "dynamic"},
        train=train,
    ),
)
