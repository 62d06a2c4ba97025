"""A small and a big network for the glyphs, and how they are trained: one processor, a minute or so for both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.glyphs import CLASSES, Glyphs
from outrider_runtimes.tensors import Array, Tensors

ROWS_A_STEP = 100
ROWS_AT_ONCE = 500
LEARNING_RATE = 3e-3


def small_network() -> nn.Module:
    """For the board. image: float32 [N, 1, 16, 16] -> logits: float32 [N, 10]."""
    torch.manual_seed(1)
    body = [*_block(1, 12), nn.MaxPool2d(2), *_block(12, 24), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(384, CLASSES))


def big_network() -> nn.Module:
    """For the cloud, at the same interface."""
    torch.manual_seed(2)
    body = [*_block(1, 24), *_block(24, 24), nn.MaxPool2d(2), *_block(24, 48), *_block(48, 48), nn.MaxPool2d(2)]
    return nn.Sequential(
        *body, *_block(48, 96), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(384, CLASSES)
    )


def train(network: nn.Module, part: Glyphs, *, epochs: int) -> nn.Module:
    """Adam, one cycle and cross-entropy, in place and seeded; the network ends in evaluation mode."""
    rng = np.random.default_rng(3)
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    steps = max(1, len(labels) // ROWS_A_STEP)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps)
    network.train()
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(labels)), steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def logits_of(network: nn.Module, images: Array) -> Array:
    """What it answers. images: float32 [N, 1, 16, 16] -> float32 [N, 10]."""
    with torch.no_grad():
        parts = [network(chunk) for chunk in torch.split(torch.from_numpy(images), ROWS_AT_ONCE)]
    logits: Array = torch.cat(parts).numpy()
    return logits


def labels_by(predict: Any, images: Array) -> Array:
    """The classes by a ``predict`` at the interface, some rows at a time. int64 [N]."""
    chunks: list[Tensors] = [
        predict({"image": images[at : at + ROWS_AT_ONCE]}) for at in range(0, len(images), ROWS_AT_ONCE)
    ]
    labels: Array = np.concatenate([chunk["logits"] for chunk in chunks]).argmax(1)
    return labels


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
