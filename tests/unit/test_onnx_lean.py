"""An ONNX graph loses what it says twice or by default, and answers the same bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from outrider_exporters.convert.onnx_lean import make_lean

CHANNELS = 8
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)


def answer(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def graph_of(nodes, constants, *, name="y"):
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", "c", "h", "w"]) for end in ("x", name)]
    tensors = [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def quantized_convolution(*, zero_point=0, strides=(1, 1)):
    """x -> quantized -> a convolution of stored int8 weights with a scale a channel and an int32 bias -> y."""
    shape = (CHANNELS, 3, 3, 3)
    zeros = np.full(CHANNELS, zero_point, np.int8)
    constants = {
        "x_scale": np.float32(0.02), "x_zero": np.uint8(128),
        "again_scale": np.float32(0.02), "again_zero": np.uint8(128),
        "w": RNG.integers(-127, 128, shape, np.int8), "w_scale": RNG.random(CHANNELS, np.float32), "w_zero": zeros,
        "b": RNG.integers(-99, 99, CHANNELS, np.int32), "b_scale": RNG.random(CHANNELS, np.float32),
        "b_zero": np.zeros(CHANNELS, np.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "again_scale", "again_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bf"], axis=0),
        helper.make_node(
            "Conv", ["xf", "wf", "bf"], ["y"],
            auto_pad="NOTSET", group=1, dilations=[1, 1], strides=list(strides), pads=[1] * 4, kernel_shape=[3, 3],
        ),
    ]  # fmt: skip
    return graph_of(nodes, constants)


def lean(model):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    make_lean(changed)
    onnx.checker.check_model(changed, full_check=True)
    assert answer(changed).tobytes() == answer(model).tobytes()
    return changed


def stored(model):
    return {item.name for item in model.graph.initializer}


def test_zero_points_of_constants_go_where_they_are_zero():
    model = lean(quantized_convolution())
    assert stored(model) == {"x_scale", "x_zero", "w", "w_scale", "b", "b_scale"}
    inputs = {node.output[0]: list(node.input) for node in model.graph.node}
    assert inputs["wf"] == ["w", "w_scale"]
    assert inputs["xf"] == ["xq", "x_scale", "x_zero"]


def test_a_zero_point_that_is_not_zero_stays():
    model = lean(quantized_convolution(zero_point=3))
    assert "w_zero" in stored(model)
    assert "b_zero" not in stored(model)


def test_attributes_go_where_they_are_the_default_and_nowhere_else():
    (plain,) = [node for node in lean(quantized_convolution()).graph.node if node.op_type == "Conv"]
    assert {item.name for item in plain.attribute} == {"pads", "kernel_shape"}
    (strided,) = [node for node in lean(quantized_convolution(strides=(2, 1))).graph.node if node.op_type == "Conv"]
    assert {item.name for item in strided.attribute} == {"pads", "kernel_shape", "strides"}


def test_constants_of_another_type_or_shape_are_not_one():
    constants = {
        "one": np.ones(1, np.float32), "same": np.ones(1, np.float32), "flat": np.ones((), np.float32),
        "shape": np.ones(1, np.int64), "axes": np.ones(1, np.int64), "y0": np.zeros(1, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Add", ["x", "one"], ["a"]),
        helper.make_node("Mul", ["a", "same"], ["b"]),
        helper.make_node("Sub", ["b", "flat"], ["c"]),
        helper.make_node("Unsqueeze", ["c", "axes"], ["d"]),
        helper.make_node("Squeeze", ["d", "shape"], ["e"]),
        helper.make_node("Max", ["e", "y0"], ["y"]),
    ]
    assert stored(lean(graph_of(nodes, constants))) == {"one", "flat", "shape", "y0"}


def test_a_constant_that_callers_know_stays_and_an_inner_graph_reads_the_one_that_is_left():
    constants = {"kept": np.float32(2.0), "gone": np.float32(2.0), "yes": np.array(True)}
    branches = {}
    for name, kind in (("then_branch", "Add"), ("else_branch", "Mul")):
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["n", "c", "h", "w"])
        branches[name] = helper.make_graph([helper.make_node(kind, ["m", "gone"], [out.name])], name, [], [out])
    nodes = [
        helper.make_node("Mul", ["x", "kept"], ["m"]),
        helper.make_node("If", ["yes"], ["y"], **branches),
    ]
    model = lean(graph_of(nodes, constants))
    assert stored(model) == {"kept", "yes"}


def test_a_constant_that_is_an_output_keeps_its_name():
    constants = {"first": np.ones((2, 3, 6, 6), np.float32), "y": np.ones((2, 3, 6, 6), np.float32)}
    model = graph_of([helper.make_node("Add", ["x", "first"], ["unused"])], constants)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    make_lean(changed)
    assert stored(changed) == {"first", "y"}
