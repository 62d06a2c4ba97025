"""Networks whose weights are seeded noise: what they answer is worthless, how long they take is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, before, H, W]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet8(nn.Module):
    """The image classifier of MLPerf Tiny. image: float32 [N, 3, 32, 32] -> logits: float32 [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        stages = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.body = nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, image: Tensor) -> Tensor:
        """image: float32 [N, 3, 32, 32]."""
        out: Tensor = self.body(image)
        return out


class TinyNet(nn.Module):
    """So small that the call around it is what is measured. image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, image: Tensor) -> Tensor:
        """image: float32 [N, 1, 8, 8]."""
        out: Tensor = self.body(image)
        return out


def seeded(build: type[nn.Module]) -> nn.Module:
    """A network in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return build().eval()
