"""What is counted of an ONNX file is what torch counts of the network that it was made from."""

from __future__ import annotations

import pytest

from outrider_exporters import Data
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.passes.base import PassContext, weigh
from outrider_exporters.sources.macs import onnx_macs
from outrider_exporters.sources.module import PositionalModule, interface_from_module
from support.networks import Recurrent, SmallCnn, TwoSided, normal, seeded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("network", "example", "outputs"),
    [
        (SmallCnn, {"image": normal(2, 1, 8, 8)}, ["scores"]),
        (Recurrent, {"x": normal(2, 6, 8)}, ["scores"]),
        (TwoSided, {"vector": normal(2, 5), "image": normal(2, 3, 8, 8)}, ["spare", "map", "score", "choice"]),
    ],
)
def test_a_file_and_its_network_have_the_same_count(tmp_path, network, example, outputs):
    module = seeded(network).eval()
    interface = interface_from_module(module, example, outputs)
    file = to_onnx(module, interface, example, tmp_path / "m.onnx")
    context = PassContext(interface=interface, example=example, data=Data(test=(example, 0)))
    assert onnx_macs(file.path) == weigh(PositionalModule(module, list(example), outputs), context).macs > 0
