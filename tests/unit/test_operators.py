from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from outrider_exporters.convert.operators import Operator, find_named, onnx_operators, tflite_paths, with_followers
from outrider_runtimes.errors import ConfigError
from support.models import onnx_model


def operator(name: str, takes: str, gives: str, layer: str = "", kind: str = "Conv") -> Operator:
    path = tuple((part,) for part in layer.split(".")) if layer else ()
    return Operator(
        name=name,
        kind=kind,
        inputs=tuple(takes.split()),
        outputs=tuple(gives.split()),
        layers=(path,) if path else (),
        weighted=bool(layer),
    )


NETWORK = (
    operator("stem", "x", "a", "stem.weight"),
    operator("relu", "a", "b", kind="Relu"),
    operator("first", "b", "c", "blocks.0.conv.weight"),
    operator("sum", "b c", "d", kind="Add"),
    operator("second", "d", "e", "blocks.1.conv.weight"),
    operator("tenth", "e", "f", "blocks.10.conv.weight"),
)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), ()),
        (("blocks.0",), ("first", "sum")),
        (("blocks.0.conv",), ("first", "sum")),
        (("blocks.1",), ("second",)),
        (("blocks",), ("first", "sum", "second", "tenth")),
        (("stem",), ("stem", "relu", "sum")),
        (("onnx:sum",), ("sum",)),
        (("tflite:whatever",), ()),
        (("onnx:tenth", "stem"), ("stem", "relu", "sum", "tenth")),
    ],
)
def test_what_a_name_means(names, found):
    assert find_named(NETWORK, names, "onnx") == found


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("block", "no layer 'block' is in the onnx file", "did you mean 'blocks'?"),
        ("conv", "no layer 'conv'", "for example"),
        ("onnx:frist", "no operator 'frist'", "did you mean 'first'?"),
    ],
)
def test_an_unknown_name_is_refused(name, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        find_named(NETWORK, [name], "onnx")
    assert hint in caught.value.hint


def test_followers_end_at_the_next_weights():
    assert with_followers(NETWORK, ["stem"]) == {"stem", "relu", "sum"}
    assert with_followers(NETWORK, ["tenth"]) == {"tenth"}


def test_the_operators_of_an_onnx_file():
    nodes = [
        helper.make_node("Conv", ["x", "module.net.0.weight"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "module.bias"], ["y"], name="Relu_1"),
    ]
    tensors = [
        numpy_helper.from_array(np.zeros((2, 1, 1, 1), np.float32), "module.net.0.weight"),
        numpy_helper.from_array(np.zeros(2, np.float32), "module.bias"),
    ]
    model = onnx_model(nodes, [("x", "float32", [1, 1, 2, 2])], [("y", "float32", [1, 2, 2, 2])], tensors)
    conv, relu, add = onnx_operators(model)
    assert (conv.name, conv.inputs, conv.outputs, conv.weighted) == ("conv", ("x",), ("a",), True)
    assert conv.within("net") and conv.within("net.0") and conv.within("net.0.weight")
    assert not conv.within("net.1") and not conv.within("module")
    assert relu.name == model.graph.node[1].name == "unnamed_1"  # Relu_1 is taken
    assert (add.weighted, add.within("bias")) == (False, True)


@pytest.mark.parametrize(
    ("name", "layers", "others"),
    [
        (
            "litert_torch.x.ChannelLastIOWrapper/outrider_exporters.sources.module.PositionalModule_wrapped/__main__.Net_module/"
            "torch.nn.modules.container.Sequential_blocks/__main__.Block_0/torch.nn.modules.conv.Conv2d_conv;1",
            ["blocks", "blocks.0", "blocks.0.conv"],
            ["conv", "0", "module", "blocks.1"],
        ),
        (
            "a.PositionalModule/b.Net_module;;a.PositionalModule/b.Net_module/torch.nn.Conv2d_stem_conv;",
            ["stem_conv"],
            ["stem"],
        ),
        ("a.PositionalModule/b.Net_module/c.Res_Block_first;", ["first"], ["Res"]),
        ("a.PositionalModule/b.Net_module;3", [], ["module"]),
        ("serving_default_output_0_output", [], ["output"]),
    ],
)
def test_the_layers_in_a_tflite_name(name, layers, others):
    operator = Operator(name=name, kind="CONV_2D", inputs=(), outputs=(name,), layers=tflite_paths(name))
    assert [layer for layer in layers if not operator.within(layer)] == []
    assert [layer for layer in others if operator.within(layer)] == []
