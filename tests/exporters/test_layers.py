"""Which layer loses what: the rule over errors, and real files of a network with a planted outlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.layers import LayerError, Node, blame_text, compare, layer_errors, to_blame
from outrider_exporters.sources.module import interface_from_module
from support.exporters import Small, random_data

pytestmark = pytest.mark.slow


def node(output, *inputs, label="", weighted=True):
    return Node(label=label or output, operator="Conv", inputs=inputs, output=output, weighted=weighted)


def test_a_layer_is_charged_with_what_it_adds_to_its_inputs():
    layers = compare([node("a", "x"), node("b", "a"), node("c", "b")], {"a": 0.01, "b": 0.30, "c": 0.31})
    assert [item.layer for item in layers] == ["a", "b", "c"]
    assert [round(item.added, 9) for item in layers] == [0.01, 0.29, 0.01]
    assert to_blame(layers)[0].layer == "b"


def test_of_two_inputs_the_worse_one_counts():
    layers = compare([node("a", "x"), node("b", "x"), node("sum", "a", "b")], {"a": 0.1, "b": 0.4, "sum": 0.45})
    assert layers[-1].added == pytest.approx(0.05)


def test_an_activation_that_was_fused_away_is_charged_to_the_layer_before_it():
    nodes = [node("conv", "x", label="features.0"), node("relu", "conv", label="relu_1", weighted=False)]
    (layer,) = compare(nodes, {"relu": 0.2})
    assert (layer.layer, layer.error, layer.added) == ("features.0", 0.2, 0.2)


def test_errors_pass_through_what_cannot_be_compared():
    nodes = [node("a", "x"), node("reshaped", "a", weighted=False), node("b", "reshaped")]
    assert compare(nodes, {"a": 0.3, "b": 0.35})[-1].added == pytest.approx(0.05)


errors = st.floats(0.0, 10.0)


@given(st.lists(st.builds(LayerError, layer=st.just("l"), operator=st.just("o"), error=errors, added=errors)))
def test_those_to_blame_are_the_worst_in_order(layers):
    guilty = to_blame(layers)
    assert len(guilty) <= 3
    assert [g.added for g in guilty] == sorted((g.added for g in guilty), reverse=True)
    if guilty:
        assert guilty[0].added == max(item.added for item in layers)
        assert blame_text(layers).startswith("quantization error grows most in l (o, +")
    elif layers:
        assert "no layer adds 1%" in blame_text(layers)
    else:
        assert blame_text(layers) == ""


@pytest.fixture(scope="module")
def planted():
    """(network, what it gives): the second convolution gets one channel that hides the others from int8."""
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.features[0].weight[0] *= 3000.0
        model.features[0].bias[0] = 3000.0
        model.features[3].weight[:, 0] /= 3000.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_the_layer_that_an_outlier_breaks_is_found(planted, tmp_path, kind):
    from outrider_exporters.convert import quantize
    from outrider_exporters.convert.onnx import to_onnx
    from outrider_exporters.convert.tflite import to_tflite

    data = random_data(rows=32)
    example = {"image": data.test[0]["image"][:2]}
    interface = interface_from_module(planted, example, ["logits"])
    convert = to_onnx if kind == "onnx" else to_tflite
    quantized_by = quantize.quantize_onnx if kind == "onnx" else quantize.quantize_tflite
    plain = convert(planted, interface, example, tmp_path / f"float.{kind}")
    quantized = quantized_by(plain, [data.calibration], interface, tmp_path / f"int8.{kind}")
    rows = {"image": data.test[0]["image"][:4]}
    layers = layer_errors(plain, quantized, interface, rows)
    assert {"features.0", "features.3", "head.1", "head.4"} <= {item.layer for item in layers}
    assert to_blame(layers)[0].layer == "features.3"
    assert all(np.isfinite([item.error, item.added]).all() for item in layers)
    same = layer_errors(plain, plain, interface, rows)
    assert max(item.error for item in same) == 0.0
