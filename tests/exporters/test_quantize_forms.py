"""The two forms of static int8 that differ in how a file holds it: integer operators, and float at its edges."""

from __future__ import annotations

import onnx
import pytest
import torch

from outrider_exporters.convert import parity, predict_file
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.quantize import quantize_file, scheme_name
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.layers import layer_errors
from outrider_exporters.passes import Quantize
from outrider_exporters.sources.module import interface_from_module, torch_predict
from outrider_runtimes.errors import ConfigError
from support.exporters import Small, random_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made():
    """(network, data, interface, a row and more)"""
    torch.manual_seed(0)
    model, data = Small().eval(), random_data(rows=40)
    rows = {"image": data.test[0]["image"][:6]}
    return model, data, interface_from_module(model, rows, ["logits"]), rows


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_integer_operators_answer_as_the_pairs_do(made, tmp_path, activations):
    model, data, interface, rows = made
    plain = to_onnx(model, interface, rows, tmp_path / "float.onnx")
    rule = Quantize(operators="qoperator", activations=activations, observer="mse")
    file = quantize_file(plain, [data.calibration], interface, tmp_path / "q.onnx", rule=rule)
    kinds = {node.op_type for node in onnx.load(str(file.path)).graph.node}
    assert "QLinearConv" in kinds
    assert "Relu" not in kinds
    assert parity(torch_predict(model, interface)(rows), predict_file(file, interface)(rows)) < 0.06
    layers = {item.layer: item.error for item in layer_errors(plain, file, interface, rows)}
    assert {"features.0", "features.3", "head.1", "head.4"} <= set(layers)
    assert 0.0 < max(layers.values()) < 0.1


@pytest.mark.slow
def test_float_edges_answer_as_int8_edges_do(made, tmp_path):
    model, data, interface, rows = made
    plain = to_tflite(model, interface, rows, tmp_path / "float.tflite")
    inner = quantize_file(plain, [data.calibration], interface, tmp_path / "int8.tflite", rule=Quantize())
    file = quantize_file(plain, [data.calibration], interface, tmp_path / "q.tflite", rule=Quantize(io="float"))
    tensors = [*file.binding.inputs, *file.binding.outputs]
    assert [(tensor.dtype, tensor.scale) for tensor in tensors] == [("float32", None)] * 2
    assert {tensor.dtype for tensor in (*inner.binding.inputs, *inner.binding.outputs)} == {"int8"}
    assert parity(predict_file(inner, interface)(rows), predict_file(file, interface)(rows)) < 0.01
    assert file.path.stat().st_size < 0.6 * plain.path.stat().st_size


@pytest.mark.parametrize(
    ("kind", "rule", "name"),
    [
        ("onnx", Quantize(), "qdq-s8s8-per-channel"),
        ("onnx", Quantize(activations="uint8", operators="qoperator"), "qoperator-u8s8-per-channel"),
        ("onnx", Quantize(io="float"), "qdq-s8s8-per-channel"),
        ("tflite", Quantize(), "static-int8-per-channel"),
        ("tflite", Quantize(io="float", per_channel=False), "static-int8-float-io-per-tensor"),
    ],
)
def test_a_scheme_says_its_form(kind, rule, name):
    assert scheme_name(kind, rule) == name


@pytest.mark.parametrize("options", [{"operators": "qdp"}, {"io": "uint8"}])
def test_unknown_forms_are_refused(options):
    with pytest.raises(ConfigError, match="expected one of"):
        Quantize(**options)


@pytest.mark.parametrize("options", [{"operators": "qoperator"}, {"io": "float"}])
def test_forms_are_of_static_int8_alone(options):
    with pytest.raises(ConfigError, match="are of scheme 'int8'"):
        Quantize("dynamic", **options)
