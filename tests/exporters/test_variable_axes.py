"""Networks whose axes may have any size, and recurrent ones: what is found out by running them, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from outrider_exporters import Quantize, Recipe
from outrider_exporters.around import open_around
from outrider_exporters.sources import formats_for, open_source
from outrider_exporters.sources.files import declare
from outrider_exporters.sources.module import describe_module, torch_predict
from outrider_runtimes.errors import ConfigError, ExportError, ShapeError
from outrider_runtimes.processing import Normalise, Softmax, TokenLookup
from outrider_runtimes.tensors import StatePair
from support import memory
from support.networks import Returns, normal
from support.variable import Both, Cells, Encoder, Resizer

pytestmark = pytest.mark.slow

IDS = {"tokens": np.random.default_rng(0).integers(0, 20, (2, 8))}
FREE = {"tokens": "T"}


def described(function, example, **options):
    network = Both(function) if len(example) == 2 else Returns(function)
    return describe_module(network, example, ["y"], **options)


def test_outputs_that_follow_a_free_axis_are_found():
    found = describe_module(Encoder(), IDS, ["each", "halves", "whole"], dynamic_axes=FREE)
    specs = {spec.name: spec for spec in (*found.interface.inputs, *found.interface.outputs)}
    assert (specs["tokens"].shape, specs["tokens"].axes) == ((None, None), "NT")
    assert (specs["each"].shape, specs["each"].axes[:2]) == ((None, None, 20), "NT")
    assert specs["halves"].shape == (None, None)
    assert specs["halves"].axes[1] not in "NT"
    assert specs["whole"].shape == (None, 16)
    assert {"T": 9} in found.sizes and {"T": 1} in found.sizes


def test_without_dynamic_axes_every_size_is_fixed():
    interface = describe_module(Encoder(), IDS, ["each", "halves", "whole"]).interface
    assert [spec.shape for spec in interface.outputs] == [(None, 8, 20), (None, 4), (None, 16)]
    with pytest.raises(ShapeError, match=r"expected \[N, 8\]"):
        torch_predict(Encoder(), interface)({"tokens": IDS["tokens"][:, :4]})


def test_two_axes_of_an_image():
    image = {"image": normal(1, 3, 8, 12)}
    found = describe_module(Resizer(), image, ["map"], dynamic_axes={"image": "HW"})
    assert found.interface.outputs[0].shape == (None, 4, None, None)
    assert found.interface.outputs[0].axes[2:] not in {"HW", "WH"}  # of 9 rows it gives 8
    assert {"H": 16, "W": 12} in found.sizes and {"H": 8, "W": 24} in found.sizes


def test_a_letter_of_two_inputs_is_one_size():
    example = {"a": normal(2, 5), "b": normal(2, 5)}
    options = {"axes": {"a": "NT", "b": "NT"}, "dynamic_axes": {"a": "T", "b": "T"}}
    found = described(torch.add, example, **options)
    assert found.interface.outputs[0].axes == "NT"
    with pytest.raises(ShapeError, match="input 'b' has T = 4, input 'a' 5"):
        torch_predict(Both(torch.add), found.interface)({"a": normal(2, 5), "b": normal(2, 4)})
    with pytest.raises(ExportError, match="T = 5 and, in 'b', T = 4"):
        described(lambda a, b: a.sum(1) + b.sum(1), {"a": normal(2, 5), "b": normal(2, 4)}, **options)


def test_an_input_that_must_be_as_long_is_asked_for():
    example = {"a": normal(2, 5), "b": normal(2, 5)}
    with pytest.raises(ExportError, match="the network takes T = 5 and no other size") as caught:
        described(lambda a, b: a * b[:, :5], example, axes={"a": "NT"}, dynamic_axes={"a": "T"})
    assert "dynamic_axes" in caught.value.hint


def test_a_network_that_takes_one_size_only():
    with pytest.raises(ExportError, match="T cannot be free: the network takes T = 8 and no other size"):
        described(lambda x: x @ torch.ones(8, 3), {"x": normal(2, 8)}, axes={"x": "NT"}, dynamic_axes={"x": "T"})


def test_the_letters_that_a_user_gives_an_output_stay():
    axes = {"x": "NTC", "y": "NSC"}
    found = described(lambda x: x[:, ::2], {"x": normal(2, 8, 3)}, axes=axes, dynamic_axes={"x": "T"})
    assert (found.interface.outputs[0].axes, found.interface.outputs[0].shape) == ("NSC", (None, None, 3))


def test_an_input_without_a_batch_axis_may_have_a_free_one():
    found = described(lambda x: x.cumsum(0), {"x": normal(6, 2)}, axes={"x": "TC"}, dynamic_axes={"x": "T"})
    assert found.interface.outputs[0].shape == (None, 2)
    assert found.interface.outputs[0].axes[0] == "T"


SERIES = {"x": normal(2, 6, 4), "h": np.zeros((2, 1, 8), np.float32), "c": np.zeros((2, 1, 8), np.float32)}
STATE = {"h": "h_next", "c": "c_next"}


def test_a_recurrent_networks_state():
    options = {"axes": {"x": "NTC", "h": "NLC"}, "dynamic_axes": {"x": "T"}, "state": STATE}
    interface = describe_module(Cells(), SERIES, ["scores", "h_next", "c_next"], **options).interface
    assert interface.state == tuple(StatePair(input=before, output=after) for before, after in STATE.items())
    specs = {spec.name: spec for spec in interface.outputs}
    assert specs["h_next"].axes == "NLC"
    assert specs["c_next"].axes == interface.inputs[2].axes
    assert specs["scores"].shape == (None, None, 3)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"z": "h_next"}, "no input 'z'"),
        ({"h": "z"}, "no output 'z'"),
        ({"h": "scores"}, "must be alike"),
        ({"h": "h_next", "c": "h_next"}, "in one pair only"),
    ],
)
def test_state_that_does_not_fit(state, words):
    with pytest.raises(ExportError, match=words):
        describe_module(Cells(), SERIES, ["scores", "h_next", "c_next"], state=state)


def test_torchs_own_layout_of_the_state_is_refused_with_what_to_do():
    network = nn.LSTM(4, 8, batch_first=True)
    swapped = {**SERIES, "h": np.zeros((1, 2, 8), np.float32), "c": np.zeros((1, 2, 8), np.float32)}

    class Plain(nn.Module):
        def forward(self, x, h, c):
            y, (h, c) = network(x, (h, c))
            return y, h, c

    with pytest.raises(ExportError, match="different numbers of rows"):
        describe_module(Plain(), swapped, ["y", "h_next", "c_next"], state=STATE)


def opened(**options):
    arguments = {"dynamic_axes": FREE, **options}
    return open_source(Encoder(), IDS, ["each", "halves", "whole"], **arguments)


def test_tflite_needs_shapes_for_free_axes():
    for formats in (None, ("tflite",), ("onnx", "tflite")):
        with pytest.raises(ConfigError, match="leaves T free, and a TFLite file has fixed sizes") as caught:
            formats_for(opened(), formats, Recipe())
        assert 'shapes={"T": [8, 16]}' in caught.value.hint and 'formats=("onnx",)' in caught.value.hint
    assert formats_for(opened(), ("onnx",), Recipe()) == ("onnx",)
    assert formats_for(opened(shapes={"T": [8, 3]}), None, Recipe()) == ("onnx", "tflite")


def test_shapes_without_tflite_are_refused():
    with pytest.raises(ConfigError, match="shapes is given, and formats is"):
        formats_for(opened(shapes={"T": [8]}), ("onnx",), Recipe())


def test_static_int8_of_several_shapes_is_a_known_gap():
    with pytest.raises(ConfigError, match="the other signatures have no ranges") as caught:
        formats_for(opened(shapes={"T": [8, 3]}), None, Recipe([Quantize("int8")]))
    assert 'Quantize("dynamic")' in caught.value.hint
    assert formats_for(opened(shapes={"T": [8]}), None, Recipe([Quantize("int8")])) == ("onnx", "tflite")
    assert formats_for(opened(shapes={"T": [8, 3]}), None, Recipe([Quantize("dynamic")])) == ("onnx", "tflite")


def test_a_size_that_the_network_cannot_take_is_named():
    with pytest.raises(ExportError, match="shapes: the network cannot take T = 65"):
        opened(shapes={"T": [8, 65]})


def test_data_of_another_size_than_shapes_is_refused():
    source = opened(shapes={"T": [8, 3]})
    source.check_sizes(IDS)
    with pytest.raises(ConfigError, match="the data has T = 5") as caught:
        source.check_sizes(IDS, {"tokens": IDS["tokens"][:, :5]})
    assert "T = 8; T = 3" in caught.value.hint
    opened().check_sizes({"tokens": IDS["tokens"][:, :5]})


def test_free_axes_with_steps_around_the_network():
    """A step that leaves the length alone passes it on; one that does not ends it."""
    series = {"x": normal(2, 6, 4), "h": SERIES["h"], "c": SERIES["c"]}
    options = {"axes": {"x": "NTC"}, "dynamic_axes": {"x": "T"}, "state": STATE}
    steps = {
        "preprocessing": [Normalise(tensor="x", mean=(0.5,), std=(2.0,), axes="NTC")],
        "postprocessing": [Softmax(tensor="scores")],
    }
    source, caller = open_around(Cells(), series, ["scores", "h_next", "c_next"], **steps, **options)
    assert caller.interface.inputs[0].shape == source.interface.inputs[0].shape == (None, None, 4)
    assert caller.interface.outputs[0].shape == (None, None, 3)
    assert caller.interface.state == source.interface.state != ()
    predict = caller.outside(source.predict())
    for length in (1, 6, 9):
        given = predict({**series, "x": normal(2, length, 4)})
        np.testing.assert_allclose(given["scores"].sum(-1), np.ones((2, length)), atol=1e-5)


def test_an_axis_that_is_free_at_the_callers_side_only():
    text = {"tokens": np.zeros((2, 12), np.uint8)}
    look_up = TokenLookup(tensor="tokens", vocabulary=("a", "b"), length=8)
    outputs, named = ["each", "halves", "whole"], {"axes": {"tokens": "NT"}}
    source, caller = open_around(Encoder(), text, outputs, preprocessing=[look_up], dynamic_axes=FREE, **named)
    assert caller.interface.inputs[0].shape == (None, None)
    assert source.interface.inputs[0].shape == (None, 8)
    predict = caller.outside(source.predict())
    assert predict({"tokens": np.full((1, 30), ord("a"), np.uint8)})["each"].shape == (1, 8, 20)


def onnx_of_two(folder):
    """a: int64 [N, S], b: int64 [N, T] -> c, the sum of both: int64 [N, 1]."""
    nodes = [
        helper.make_node("ReduceSum", ["a", "one"], ["left"], keepdims=1),
        helper.make_node("ReduceSum", ["b", "one"], ["right"], keepdims=1),
        helper.make_node("Add", ["left", "right"], ["c"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "two",
        [value("a", TensorProto.INT64, ["N", "S"]), value("b", TensorProto.INT64, ["N", "T"])],
        [value("c", TensorProto.INT64, ["N", 1])],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    path = folder / "two.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_open_axes_of_a_file_need_not_be_equal(tmp_path):
    example = {"a": np.ones((2, 3), np.int64), "b": np.ones((2, 5), np.int64)}
    found = declare(onnx_of_two(tmp_path), example=example)
    first, second = (spec.axes for spec in found.interface.inputs)
    assert first == "NT" and second[0] == "N" and second[1] != "T"
    with pytest.raises(ShapeError, match="input 'b' has T = 5, input 'a' 3"):
        declare(onnx_of_two(tmp_path), example=example, axes={"b": "NT", "a": "NT"})


def test_a_tflite_file_with_several_shapes_stays_one(tmp_path):
    path = tmp_path / "memory.tflite"
    path.write_bytes(memory.tflite_bytes())
    example = {"x": np.ones((2, 3), np.float32), "h": np.ones((2, 1), np.float32)}
    source = open_source(path, example, None, state={"h": "h_next"})
    assert source.file.binding.signatures == ({"h": (1, 1), "x": (1, 3)}, {"h": (1, 1), "x": (1, 5)})
    assert source.interface.state == (StatePair(input="h", output="h_next"),)
    x = normal(3, 5)
    given = source.predict()({"x": x, "h": np.ones((3, 1), np.float32)})
    np.testing.assert_allclose(given["y"], memory.step(x, np.ones((3, 1)))[0], atol=1e-6)
    with pytest.raises(ShapeError, match=r"'x' \[N, 4\] is none of them"):
        source.predict()({"x": x[:, :4], "h": np.ones((3, 1), np.float32)})


def test_a_file_says_itself_what_is_free_and_its_caller_what_is_state(tmp_path):
    path, example = onnx_of_two(tmp_path), {"a": np.ones((2, 3), np.int64), "b": np.ones((2, 1), np.int64)}
    for name, value in (("dynamic_axes", {"a": "T"}), ("shapes", {"T": [3]})):
        with pytest.raises(ConfigError, match=f"{name} is given, and the model is a file"):
            open_source(path, example, None, **{name: value})
    with pytest.raises(ConfigError, match="must be alike"):
        open_source(path, example, None, state={"a": "c"})
