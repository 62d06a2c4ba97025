"""A network with a channel that is 300 times the others: int8 fails, and only both neighbours in float restore it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from support.networks import digits, seeded

TRAIN_ROWS = 1200


class Deep(nn.Module):
    """`image: float32 [N, 1, 8, 8] -> float32 [N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.first = nn.Conv2d(12, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(image))))
        x = functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(functional.max_pool2d(torch.relu(self.last(x)), 2).flatten(1))


def trained() -> Deep:
    images, targets = (torch.from_numpy(a[:TRAIN_ROWS]) for a in digits())
    network = seeded(Deep)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for part in torch.randperm(TRAIN_ROWS, generator=generator).split(64):
            loss = functional.cross_entropy(network(images[part]), targets[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def planted(network: Deep, factor: float = 300.0) -> Deep:
    """The same function, with one channel between `first` and `second` that is so many times larger."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        strongest = int(network.first.weight.flatten(1).abs().sum(1).argmax())
        other.first.weight[strongest] *= factor
        other.first.bias[strongest] *= factor
        other.second.weight[:, strongest] /= factor
    return other
