"""Multiply-accumulates of ONNX files: by hand, and never a number that was not counted."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from outrider_exporters.sources.macs import UNCOUNTED, onnx_macs
from support.models import onnx_model


def macs_of(tmp_path, nodes, inputs, outputs, **tensors):
    arrays = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in tensors.items()]
    path = tmp_path / "m.onnx"
    model = onnx_model(nodes, inputs, outputs, arrays)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    return onnx_macs(path)


def node(kind, *inputs, **options):
    return helper.make_node(kind, list(inputs), ["y"], **options)


IMAGE = [("x", "float32", ["N", 4, 10, 10])]
Y4 = [("y", "float32", ["N", "c", "h", "w"])]


@pytest.mark.parametrize(
    ("made", "inputs", "outputs", "tensors", "wanted"),
    [
        (node("Conv", "x", "w", strides=[2, 2], pads=[1] * 4), IMAGE, Y4, {"w": (8, 4, 3, 3)}, 5 * 5 * 8 * 4 * 9),
        (node("Conv", "x", "w", group=4), IMAGE, Y4, {"w": (4, 1, 3, 3)}, 8 * 8 * 4 * 9),
        (node("ConvTranspose", "x", "w", strides=[2, 2]), IMAGE, Y4, {"w": (4, 6, 2, 2)}, 400 * 6 * 4),
        (node("Gemm", "x", "w"), [("x", "float32", ["N", 7])], [("y", "float32", ["N", 3])], {"w": (7, 3)}, 21),
        (
            node("Gemm", "x", "w", transA=1),
            [("x", "float32", [7, 5])],
            [("y", "float32", [5, 3])],
            {"w": (7, 3)},
            105,
        ),
        (
            node("MatMul", "x", "z"),
            [("x", "float32", ["N", 2, 6, 5]), ("z", "float32", ["N", 2, 5, 6])],
            Y4,
            {},
            2 * 6 * 6 * 5,
        ),
        (
            node("GRU", "x", "w", "r", hidden_size=8),
            [("x", "float32", [5, "N", 3])],
            Y4,
            {"w": (1, 24, 3), "r": (1, 24, 8)},
            None,
        ),
        (
            node("LSTM", "x", "w", "r", hidden_size=8),
            [("x", "float32", [5, 1, 3])],
            Y4,
            {"w": (1, 32, 3), "r": (1, 32, 8)},
            5 * 32 * (3 + 8),
        ),
        (node("Relu", "x"), IMAGE, Y4, {}, 0),
    ],
)
def test_each_kind_of_product_is_counted(tmp_path, made, inputs, outputs, tensors, wanted):
    assert macs_of(tmp_path, [made], inputs, outputs, **tensors) == wanted


def test_products_follow_shapes_that_only_the_graph_implies(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["a"], pads=[1] * 4),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["b"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    shapes = {"c": (2, 4, 3, 3), "w": (50, 3)}
    assert macs_of(tmp_path, nodes, IMAGE, [("y", "float32", ["N", 3])], **shapes) == 100 * 2 * 36 + 150


@pytest.mark.parametrize("kind", sorted(UNCOUNTED & {"Einsum", "MatMulInteger"}))
def test_a_product_that_is_not_counted_makes_the_sum_unknown(tmp_path, kind):
    options = {"equation": "ij,jk->ik"} if kind == "Einsum" else {}
    made = node(kind, "x", "z", **options)
    given = [("x", "float32", [2, 3]), ("z", "float32", [3, 2])]
    assert macs_of(tmp_path, [made], given, [("y", "float32", [2, 2])]) is None


def test_an_operator_of_another_set_makes_it_unknown_but_not_a_pair_that_only_rounds(tmp_path):
    other = node("FusedMatMul", "x", "w", domain="com.microsoft")
    given, answer = [("x", "float32", ["N", 7])], [("y", "float32", ["N", 3])]
    assert macs_of(tmp_path, [other], given, answer, w=(7, 3)) is None


def test_what_only_rounds_is_no_product_of_another_set(tmp_path):
    pair = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("QuantizeLinear", ["z", "s"], ["y"], domain="com.microsoft"),
    ]
    given, answer = [("x", "float32", ["N", 7])], [("y", "uint8", ["N", 3])]
    assert macs_of(tmp_path, pair, given, answer, w=(7, 3), s=()) == 21


def test_a_size_that_the_file_leaves_open_makes_it_unknown(tmp_path):
    made = node("MatMul", "x", "w")
    assert macs_of(tmp_path, [made], [("x", "float32", ["N", "T", 7])], Y4[:1], w=(7, 3)) is None


def test_a_product_within_a_branch_makes_it_unknown(tmp_path):
    def branch(kind):
        out = helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["x", "w"], [f"{kind}_out"])], kind, [], [out])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["test"]),
        helper.make_node("If", ["test"], ["y"], then_branch=branch("MatMul"), else_branch=branch("Add")),
    ]
    shapes = {"w": (3, 3), "zero": ()}
    assert macs_of(tmp_path, nodes, [("x", "float32", [3, 3])], [("y", "float32", [3, 3])], **shapes) is None
