from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters.convert import parity, predict_file
from outrider_exporters.convert.fuse import fuse_transposed
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.sources.module import torch_predict
from support.converted import convert
from support.networks import normal

pytestmark = pytest.mark.slow


class Generator(nn.Module):
    """`x: float32 [N, 8] -> float32 [N, 3, 16, 16]`; with `peek`, something else takes what goes into the norm."""

    def __init__(self, *, peek: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8 * 16)
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.up2 = nn.ConvTranspose2d(8, 3, 4, 2, 1)
        self.peek, self.twice = peek, twice

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raw = self.up(self.dense(x).reshape(-1, 8, 4, 4))
        normed = torch.relu(self.norm(raw))
        if self.twice:
            normed = self.norm(normed)
        return (torch.tanh(self.up2(normed + raw if self.peek else normed)),)


def lived(network: nn.Module) -> nn.Module:
    """With statistics that are not those of a new layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
        with torch.no_grad():
            for _ in range(20):
                network.train()(torch.from_numpy(normal(64, 8)))
    return network.eval()


def test_the_norm_goes_into_the_convolution():
    network, x = lived(Generator()), torch.from_numpy(normal(4, 8, seed=1))
    fused = fuse_transposed(network, [x])
    assert isinstance(fused.norm, nn.Identity)
    assert isinstance(network.norm, nn.BatchNorm2d)  # the user's is left alone
    torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [Generator(peek=True), Generator(twice=True), nn.Sequential(nn.Linear(8, 2))])
def test_what_cannot_be_fused_stays(network):
    lived(network)
    assert fuse_transposed(network, [torch.from_numpy(normal(4, 8))]) is network


def test_the_interpreter_takes_the_int8_file(tmp_path):
    example = {"x": normal(64, 8)}
    made = convert(lived(Generator()), example, ["image"], tmp_path)
    file = quantize_file(made.files["tflite"], [example], made.interface, tmp_path / "q")
    wrong = parity(torch_predict(made.network, made.interface)(example), predict_file(file, made.interface)(example))
    assert wrong < 0.05
    assert np.isfinite(wrong)
