"""The two networks of the demo and how they are trained."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from outrider_exporters.demo.data import GENTLE, HARSH, Part, disturbed


class SmallNet(nn.Module):
    """For the board. image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(image))
        return out


class StrongNet(nn.Module):
    """For the cloud. image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        self.features = nn.Sequential(
            *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(image))
        return out


def train(model: nn.Module, part: Part, *, epochs: int, learning_rate: float, seed: int) -> None:
    """Adam with a cosine schedule and cross-entropy, in place; the model ends in evaluation mode."""
    rng = np.random.default_rng(seed)
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(labels)), max(1, len(labels) // 64)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    model.eval()


def trained_small(part: Part, *, seed: int, cache: Path) -> tuple[nn.Module, bool]:
    """The board's network, trained on gently disturbed images; whether it was trained now or read from the cache."""
    return _trained(SmallNet, disturbed(part, 8_000, GENTLE, np.random.default_rng(seed)), 12, seed, cache)


def trained_strong(part: Part, *, seed: int, cache: Path) -> tuple[nn.Module, bool]:
    """The cloud's network, trained on what the stream may bring and more."""
    return _trained(StrongNet, disturbed(part, 16_000, HARSH, np.random.default_rng(seed)), 8, seed, cache)


def _trained(build: type[nn.Module], part: Part, epochs: int, seed: int, cache: Path) -> tuple[nn.Module, bool]:
    torch.manual_seed(seed)
    model = build()
    file = cache / f"{build.__name__}-{_cache_key(part, epochs, seed)}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval(), False
    train(model, part, epochs=epochs, learning_rate=2e-3, seed=seed)
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.rename(file)
    return model, True


def _cache_key(part: Part, epochs: int, seed: int) -> str:
    """Digest of this module's code, the data and the settings."""
    hasher = hashlib.sha256(inspect.getsource(inspect.getmodule(train) or train).encode())
    hasher.update(part.images.tobytes() + part.labels.tobytes() + f"{epochs} {seed} {torch.__version__}".encode())
    return hasher.hexdigest()[:20]
