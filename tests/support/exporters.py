"""What the exporters' tests export: scikit-learn's digits, a small network, a stronger teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from outrider_exporters import Data, ExportReport, export
from outrider_exporters.passes import PassContext
from outrider_exporters.sources.module import PositionalModule, interface_from_module

LABELS = tuple("0123456789")


class Small(nn.Module):
    """image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image))


def digits() -> Data:
    """1,797 images: 1,000 to train, 300 to calibrate, the rest to test; no image in two parts."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = (raw.images / 16.0).astype(np.float32)[:, np.newaxis]
    order = np.random.default_rng(0).permutation(len(images))
    train, calibration, test = np.split(order, [1000, 1300])
    targets = raw.target.astype(np.int64)
    return Data(
        train=({"image": images[train]}, targets[train]),
        calibration={"image": images[calibration]},
        test=({"image": images[test]}, targets[test]),
    )


def fit(model: nn.Module, train: Any, epochs: int = 6) -> None:
    """Adam and cross-entropy, in place."""
    images, targets = torch.from_numpy(train[0]["image"]), torch.from_numpy(train[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), targets[rows]).backward()
            optimizer.step()


def trained(make: Callable[[], nn.Module], data: Data, *, seed: int, epochs: int) -> nn.Module:
    """A model of the seed's, its first weights too: trained, and in evaluation mode."""
    torch.manual_seed(seed)
    model = make().train()
    fit(model, data.train, epochs)
    return model.eval()


def accuracy(predict: Any, test: Any) -> dict[str, float]:
    """The share of right classes."""
    inputs, targets = test
    return {"accuracy": float((predict(inputs)["logits"].argmax(-1) == targets).mean())}


def run(model: nn.Module, data: Any, output: Any, **options: Any) -> ExportReport:
    """An export that takes a second: one format, nothing done to the network, unless told otherwise."""
    arguments: dict[str, Any] = {
        "example": {"image": np.zeros((1, 1, 8, 8), np.float32)},
        "outputs": ["logits"],
        "data": data,
        "evaluate": accuracy,
        "formats": ("onnx",),
        "output": output,
    }
    return export(model, **{**arguments, **options})


def random_data(*, rows: int = 96, seed: int = 0) -> Data:
    """Noise of the digits' shape, for what needs no accuracy."""
    rng = np.random.default_rng(seed)

    def part() -> tuple[dict[str, Any], Any]:
        return {"image": rng.random((rows, 1, 8, 8), dtype=np.float32)}, rng.integers(0, 10, rows)

    return Data(train=part(), calibration=part()[0], test=part())


def workshop(model: nn.Module, data: Data, **options: Any) -> tuple[PositionalModule, PassContext]:
    """A trainable copy of a network that takes an image and gives logits, and a context for passes."""
    example = {"image": data.test[0]["image"][:2]}
    network = PositionalModule(model, ["image"], ["logits"])
    network.requires_grad_(True)
    interface = interface_from_module(model, example, ["logits"])
    return network, PassContext(interface=interface, example=example, data=data, **options)


def no_fit(model: nn.Module, train: Any) -> None:
    """Leaves the network as it is."""


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
