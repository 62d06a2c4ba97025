"""A depthwise-separable network whose channels reach very differently far, as those of trained MobileNets do."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from support.networks import digits, seeded
from support.training import TRAIN_ROWS, fitting

WIDTH = 8
SIGMA = 0.8  # of the logarithm of a channel's factor


def _block(taken: int, given: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(taken, taken, 3, stride, 1, groups=taken, bias=False), nn.BatchNorm2d(taken), nn.ReLU(),
        nn.Conv2d(taken, given, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU(),
    )  # fmt: skip


class Separable(nn.Module):
    """`image: float32 [N, 1, 8, 8] -> float32 [N, 10]`, 4,234 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            *_block(WIDTH, WIDTH), *_block(WIDTH, 2 * WIDTH, 2),
            *_block(2 * WIDTH, 2 * WIDTH), *_block(2 * WIDTH, 2 * WIDTH),
        )  # fmt: skip
        self.head = nn.Linear(2 * WIDTH, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).mean((2, 3)))


def trained_separable() -> nn.Module:
    """After 12 epochs on the first digits."""
    images, targets = digits()
    network = seeded(Separable).train()
    fitting(12, 1e-2)(network, ({"image": images[:TRAIN_ROWS]}, targets[:TRAIN_ROWS]))
    return network.eval()


def skewed(network: Separable) -> Separable:
    """The same function: what a channel gives is larger by a factor, and what takes it smaller; ReLU lets both pass."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    steps = [(other.features[at], other.features[at + 1]) for at in range(0, len(other.features), 3)]
    with torch.no_grad():
        for (_, norm), (reader, _) in itertools.pairwise(steps):
            factor = torch.exp(SIGMA * torch.randn(norm.num_features, generator=generator))
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            reader.weight.div_(factor.reshape(-1, 1, 1, 1) if reader.groups > 1 else factor.reshape(1, -1, 1, 1))
    return other
