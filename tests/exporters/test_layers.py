"""Which layer loses what: the rule over errors, and real files of a network with a planted outlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks.attention import Block as AttentionBlock
from networks.keras_networks import build_text, library
from networks.recurrent import LastStep
from networks.tiny import mobilenet
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.layers import LayerError, Node, blame_text, compare, layer_errors, to_blame
from outrider_exporters.passes import Quantize
from outrider_exporters.sources.module import interface_from_module
from support.exporters import Small, random_data
from support.networks import normal

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


def test_the_error_of_next_to_nothing_counts_for_as_little():
    """A mean that is a fiftieth of what it is taken from is all noise, which the difference hardly shows."""

    def add(output, *inputs):
        return Node(label=output, operator="SUB", inputs=inputs, output=output, weighted=False)

    nodes = [node("a", "x"), node("mean", "a"), node("scaled", "mean"), add("y", "a", "scaled"), node("z", "y")]
    errors = {"a": 0.02, "mean": 0.82, "scaled": 0.82, "y": 0.04, "z": 0.05}
    small = compare(nodes, errors, {"a": 1.0, "mean": 0.02, "scaled": 0.02, "y": 1.0, "z": 1.0})
    assert [item.error for item in small] == list(errors.values())
    assert [round(item.added, 9) for item in small] == [0.02, 0.016, 0.0, 0.02, 0.01]
    equal = compare(nodes, errors, dict.fromkeys(errors, 1.0))
    assert round(equal[1].added, 9) == 0.8
    assert [item.added for item in compare(nodes, errors)] == [item.added for item in equal]


def test_errors_pass_through_what_cannot_be_compared():
    nodes = [node("a", "x"), node("reshaped", "a", weighted=False), node("b", "reshaped")]
    assert compare(nodes, {"a": 0.3, "b": 0.35})[-1].added == pytest.approx(0.05)


def test_an_operator_without_weights_that_was_fused_away_gives_its_label_to_nothing():
    nodes = [node("shape", "x", weighted=False), node("turned", "shape", label="turned", weighted=False)]
    assert [item.layer for item in compare(nodes, {"turned": 0.1})] == ["turned"]


def test_what_only_moves_values_bears_the_label_of_what_computed_them():
    """The outlier's own slice is right; the others, which it hid, are not: what gave all three is to blame."""
    nodes = [
        node("mix", "x"),
        node("bias", "mix", weighted=False),
        Node(label="r", operator="Reshape", inputs=("bias",), output="gone", weighted=False),
        Node(label="s", operator="Slice", inputs=("gone",), output="q", weighted=False),
        Node(label="t", operator="TRANSPOSE", inputs=("q",), output="turned", weighted=False),
        node("relu", "turned", weighted=False),
    ]
    layers = compare(nodes, {"mix": 0.01, "bias": 0.01, "q": 0.9, "turned": 0.9, "relu": 0.91})
    assert [item.layer for item in layers] == ["mix", "bias", "bias", "bias", "relu"]
    assert to_blame(layers)[0] == LayerError(layer="bias", operator="Conv", error=0.9, added=0.89)


def test_a_layer_of_several_operators_is_blamed_once_for_its_worst():
    steps = [LayerError(layer="cells", operator="MUL", error=e, added=e) for e in (0.1, 0.3, 0.2)]
    other = LayerError(layer="dense", operator="FULLY_CONNECTED", error=0.15, added=0.15)
    assert [(item.layer, item.added) for item in to_blame([*steps, other])] == [("cells", 0.3), ("dense", 0.15)]


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
    from outrider_exporters.convert.onnx import to_onnx
    from outrider_exporters.convert.tflite import to_tflite

    data = random_data(rows=32)
    example = {"image": data.test[0]["image"][:2]}
    interface = interface_from_module(planted, example, ["logits"])
    convert = to_onnx if kind == "onnx" else to_tflite
    plain = convert(planted, interface, example, tmp_path / f"float.{kind}")
    quantized = quantize_file(plain, [data.calibration], interface, tmp_path / f"int8.{kind}")
    rows = {"image": data.test[0]["image"][:4]}
    layers = layer_errors(plain, quantized, interface, rows)
    assert {"features.0", "features.3", "head.1", "head.4"} <= {item.layer for item in layers}
    assert to_blame(layers)[0].layer == "features.3"
    assert all(np.isfinite([item.error, item.added]).all() for item in layers)
    same = layer_errors(plain, plain, interface, rows)
    assert max(item.error for item in same) == 0.0


def _both(module, example, outputs, folder, rules):
    """By format, the float file and the one that a rule makes of it, with the interface."""
    from support.converted import convert

    made = convert(module, example, outputs, folder)
    return {
        kind: (
            made.files[kind],
            quantize_file(made.files[kind], [example], made.interface, folder / f"q.{kind}", rule=rules[kind]),
            made.interface,
        )
        for kind in made.files
    }


def _layers_of(files, example, kind):
    plain, quantized, interface = files[kind]
    rows = {name: array[:4] for name, array in example.items()}
    layers = layer_errors(plain, quantized, interface, rows)
    assert all(np.isfinite([item.error, item.added]).all() for item in layers)
    assert max(item.error for item in layer_errors(plain, plain, interface, rows)) == 0.0
    return layers


def test_of_an_attention_block_the_projection_with_an_outlier_is_found(tmp_path):
    """One feature of the values hides queries and keys, which share its tensor; the layer after it undoes it."""
    torch.manual_seed(0)
    module, example = AttentionBlock().eval(), {"tokens": normal(6, 16, 768)}
    with torch.no_grad():
        module.mix.weight[-1] *= 3000.0
        module.mix.bias[-1] = 3000.0
        module.out.weight[:, -1] /= 3000.0
        for norm in (module.first, module.second):
            norm.weight.uniform_(0.9, 1.1)  # of two equal constants the exporter keeps one, and its name
            norm.bias.uniform_(-0.1, 0.1)
    rules = dict.fromkeys(("onnx", "tflite"), Quantize())
    files = _both(module, example, ["scores"], tmp_path, rules)
    for kind in files:
        layers = _layers_of(files, example, kind)
        assert {"mix", "out", "inner.2", "first", "second", "dense"} <= {item.layer for item in layers}
        assert to_blame(layers)[0].layer == "mix"


def test_of_a_mobilenet_the_depthwise_layer_behind_an_outlier_is_found(tmp_path):
    """Its first four blocks, as the others are more of the same."""
    torch.manual_seed(0)
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 2)]
    module, example = torch.nn.Sequential(*mobilenet()[:27], *head).eval(), {"image": normal(6, 3, 48, 48)}
    with torch.no_grad():
        for layer in module:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_var.mul_(0.1)  # an untrained network would fade out
        module[7].weight[0] = 3000.0
        module[7].bias[0] = 3000.0
        module[9].weight[0] /= 3000.0
    files = _both(module, example, ["scores"], tmp_path, dict.fromkeys(("onnx", "tflite"), Quantize()))
    for kind in files:
        layers = _layers_of(files, example, kind)
        assert to_blame(layers)[0].layer == "9"
        assert {str(at) for at in (0, 3, 6, 9, 24, 29)} <= {item.layer for item in layers}


def test_the_operators_of_a_recurrent_layer_bear_its_name(tmp_path):
    """The exporter cuts its weights up and puts them together again; TFLite unrolls it."""
    torch.manual_seed(0)
    module, example = LastStep(torch.nn.LSTM(8, 64, batch_first=True)).eval(), {"steps": normal(6, 4, 8)}
    rules = {"onnx": Quantize("weight-only"), "tflite": Quantize("dynamic")}
    files = _both(module, example, ["scores"], tmp_path, rules)
    layers = _layers_of(files, example, "onnx")
    cells, *moved = [item for item in layers if item.operator == "LSTM"]
    assert cells.layer == "recurrent" and cells.added == cells.error > 0.0
    assert all(item.layer == "recurrent" for item in moved)
    assert {"recurrent", "dense"} <= {item.layer for item in _layers_of(files, example, "tflite")}


def test_of_a_keras_network_whose_weights_have_no_names_each_operator_can_be_told_apart(tmp_path):
    library()
    module = build_text()
    example = {"tokens": np.arange(6 * 24).reshape(6, 24).astype(np.int32) % 402}
    files = _both(
        module, example, ["praise"], tmp_path, {"onnx": Quantize("weight-only"), "tflite": Quantize("dynamic")}
    )
    for kind, table in (("onnx", "Gather"), ("tflite", "EMBEDDING_LOOKUP")):
        layers = _layers_of(files, example, kind)
        product = "MatMul" if kind == "onnx" else "FULLY_CONNECTED"
        assert len({item.layer for item in layers if item.operator == product}) == 2
        embedding, *_ = [item for item in layers if item.operator == table]
        assert embedding.added == embedding.error > 0.0
