"""Networks whose weights are seeded noise: what they answer is worthless, how long they take is not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

SETTLING_ROWS = 4


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed(before, after, 3, stride=stride, padding=1), nn.ReLU(), *_normed(after, after, 3, padding=1)
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(*_normed(before, after, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, before, H, W]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class InvertedBottleneck(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3, a 1x1 that narrows again; a shortcut where the shape stays."""

    def __init__(self, before: int, after: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = before * widening
        self.adds = stride == 1 and before == after
        widen = [] if widening == 1 else [*_normed(before, wide, 1), nn.ReLU6()]
        depthwise = [*_normed(wide, wide, 3, stride=stride, padding=1, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*widen, *depthwise, *_normed(wide, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [N, before, H, W]."""
        out: Tensor = self.body(x)
        return x + out if self.adds else out


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016). image: float32 [N, 3, 224, 224] -> logits: float32 [N, 1000]."""
    stem = [*_normed(3, 64, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 256, 512)
    stages = [
        block
        for before, after in pairwise(widths)
        for block in (Residual(before, after, 1 if before == after else 2), Residual(after, after, 1))
    ]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0 (Sandler et al. 2018, table 2). image: float32 [N, 3, 224, 224] -> logits: float32 [N, 1000]."""
    layers: list[nn.Module] = [*_normed(3, 32, 3, stride=2, padding=1), nn.ReLU6()]
    before = 32
    for widening, after, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            layers.append(InvertedBottleneck(before, after, stride if repeat == 0 else 1, widening))
            before = after
    layers += [*_normed(before, 1280, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def _normed(before: int, after: int, size: int, **options: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, size, bias=False, **options), nn.BatchNorm2d(after)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return build().eval()


def settled(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The network with batch norm as it is after training: without, activations of deep ones fade or explode.

    Args:
        shape: of one input image, without N.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over what it saw
        norm.reset_running_stats()
    with torch.no_grad():
        network.train()(torch.rand(SETTLING_ROWS, *shape, generator=torch.Generator().manual_seed(0)))
    return network.eval()
