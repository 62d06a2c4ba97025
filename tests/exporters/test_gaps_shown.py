"""Of the known gaps: that each still fails, with an error that names it, and that what is said instead works."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.known_gaps import KNOWN_GAPS
from outrider_exporters.passes import Quantize
from outrider_exporters.sources.module import interface_from_module
from outrider_runtimes.errors import ExportError
from support.networks import Returns, normal

pytestmark = pytest.mark.slow

CONVERT = {"onnx": to_onnx, "tflite": to_tflite}
MATRICES, ROWS = normal(2, 4, 4), normal(2, 4)


class Branch(nn.Module):
    def forward(self, x):
        if x.abs().max() > 1e6:
            return x * 0
        return x


class Masked(nn.Module):
    """x: float32 [N, 5, 8] -> the same."""

    def __init__(self, *, told: bool) -> None:
        super().__init__()
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.told = told

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.blocks(x, mask=mask, is_causal=True) if self.told else self.blocks(x, mask=mask)


class Cells(nn.Module):
    """x: float32 [N, 6, 4] -> float32 [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.dense = nn.GRU(4, 24, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        return self.dense(self.cells(x)[0][:, -1])


LGAMMA = torch.lgamma(torch.linspace(0.1, 3.1, 31))[:, None]


def by_table(x):
    return functional.embedding((x * 10).clamp(0, 30).long(), LGAMMA)


BRANCH = (Branch(), ROWS, "a condition or a size that depends on a tensor's values at test_gaps_shown.py")
WHERE = (Returns(lambda x: torch.where(x.abs().amax(1, keepdim=True) > 1e6, x * 0, x)), ROWS)
SORT = (Returns(lambda x: x.sort(1)[0]), ROWS)
NONZERO = (Returns(lambda x: x.sum(1) + (x > 1e6).nonzero().sum()), ROWS)
# By the gap's network: what fails with which words, in which format, and what works instead.
SHOWN = {
    "nn.Transformer with a mask of its own": (
        "onnx", (Masked(told=False), normal(2, 5, 8), "looks at its values"),
        "onnx", (Masked(told=True), normal(2, 5, 8)),
    ),
    "a condition or a loop on a tensor's values": ("onnx", BRANCH, "onnx", WHERE),
    "a condition, a loop or a size that depends on a tensor's values": (
        "tflite", (*NONZERO, r"aten.nonzero.default \(node 'nonzero'\)"), "onnx", NONZERO,
    ),
    "sorting and top-k": ("tflite", (*SORT, "LiteRT has no form of the operator STABLEHLO_SORT"), "onnx", SORT),
    "distances by torch.cdist": (
        "onnx", (Returns(lambda x: torch.cdist(x, x)), MATRICES, "aten._cdist_forward"),
        "onnx", (Returns(lambda x: ((x[:, :, None] - x[:, None]) ** 2).sum(-1).sqrt()), MATRICES),
    ),
    "determinants": (
        "tflite", (Returns(torch.linalg.det), MATRICES, "aten._linalg_det"),
        "onnx", (Returns(torch.linalg.det), MATRICES),
    ),
    "matrix decompositions and inverses": (
        "onnx", (Returns(lambda x: torch.linalg.svd(x)[1]), MATRICES, r"aten._linalg_svd \(node '_linalg_svd'\)"),
        "onnx", (Returns(lambda x: x @ torch.eye(4)), MATRICES),
    ),
    "special functions": (
        "tflite", (Returns(torch.lgamma), ROWS, "aten.lgamma"), "tflite", (Returns(by_table), ROWS),
    ),
}  # fmt: skip
BY_PRECISION = {"recurrent", "generators of transposed convolutions", "several shapes in one file"}


def convert(model_format, network, x, folder):
    interface = interface_from_module(network.eval(), {"x": x}, ["y"])
    return interface, CONVERT[model_format](network, interface, {"x": x}, folder / f"m.{model_format}")


def test_every_gap_is_shown_here():
    assert {gap.network for gap in KNOWN_GAPS} == set(SHOWN) | BY_PRECISION


@pytest.mark.parametrize("network", SHOWN)
def test_it_fails_with_its_reason_and_the_other_way_works(tmp_path, network):
    (gap,) = [gap for gap in KNOWN_GAPS if gap.network == network]
    failing, (module, x, words), working, instead = SHOWN[network]
    with pytest.raises(ExportError, match=words) as caught:
        convert(failing, module, x, tmp_path)
    assert gap.reason in str(caught.value)
    assert caught.value.hint == gap.instead
    assert not list(tmp_path.iterdir())
    convert(working, *instead, tmp_path)


@pytest.mark.parametrize(
    ("network", "x", "scheme"),
    [
        (Cells(), normal(8, 6, 4), "int8"),
        (
            nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 1, 1)),
            normal(8, 4, 3, 3),
            "dynamic",
        ),
    ],
)
def test_a_scheme_that_quantizes_next_to_nothing_is_refused(tmp_path, network, x, scheme):
    interface, file = convert("onnx", network, x, tmp_path)
    with pytest.raises(ExportError, match=rf"{scheme} quantized \d\.\d% of the weights") as caught:
        quantize_file(file, [{"x": x}], interface, tmp_path / "q.onnx", rule=Quantize(scheme))
    assert 'Quantize("weight-only") stores their weights in 8 bits' in caught.value.hint
    quantize_file(file, [{"x": x}], interface, tmp_path / "q.onnx", rule=Quantize("weight-only"))
