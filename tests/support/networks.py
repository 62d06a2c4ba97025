"""Small torch networks with seeded weights, and digits to train one on."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class SmallCnn(nn.Module):
    """`image: float32 [N, 1, 8, 8] -> float32 [N, 10]`, with what must be off in evaluation: batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image))


class TokenClassifier(nn.Module):
    """`tokens: int64 [N, T] -> float32 [N, 4]`, vocabulary 100."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 16)
        self.dense = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dense(self.table(tokens).mean(1))


class TwoSided(nn.Module):
    """`image: [N, 3, 8, 8], vector: [N, 5] -> {map: [N, 4, 8, 8], score: [N], choice: int64 [N], spare: [N]}`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.dense = nn.Linear(5, 4)

    def forward(self, vector: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = self.dense(vector)
        score = weights.sum(-1)
        return {
            "spare": score * 2,
            "map": self.conv(image) * weights[:, :, None, None],
            "score": score,
            "choice": weights.argmax(-1),
        }


class Recurrent(nn.Module):
    """`x: float32 [N, 6, 8] -> float32 [N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 16, batch_first=True)
        self.dense = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.cells(x)[0][:, -1])


class RowByRow(nn.Module):
    """Takes any N in torch, but its loop over the rows fixes N in a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.dense(row) for row in x])


class Returns(nn.Module):
    """Gives what `function` makes of its input."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x * self.scale)


def seeded(make: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network in training mode, as users have it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, shuffled: float32 [1797, 1, 8, 8] in 0..1, int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order, None] / 16).astype(np.float32), data.target[order].astype(np.int64)


def trained_cnn(rows: int = 1200, epochs: int = 6) -> nn.Module:
    """SmallCnn after a few epochs on the first digits; the rest is for tests."""
    images, targets = digits()
    network = seeded(SmallCnn).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        for _ in range(epochs):
            for part in torch.randperm(rows).split(64):
                loss = functional.cross_entropy(
                    network(torch.from_numpy(images)[part]), torch.from_numpy(targets)[part]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network
