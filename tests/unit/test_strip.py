"""Files lose what only people read, and nothing that they compute or that callers know them by."""

from __future__ import annotations

import re

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper

from outrider_exporters.convert.strip import ALIGNMENT, strip_onnx, strip_tflite
from support.models import onnx_model
from support.tflitefiles import packed_tflite, parsed_tflite
from support.tinymodels import classifier_onnx, classifier_tflite, images, weights


def run_onnx(content, **feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_tflite(content, x):
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return given["name"], wanted["name"], interpreter.get_tensor(wanted["index"])


def noted_onnx():
    """The classifier with everything that may go: notes, node names, long inner names, shapes, operator sets."""
    model = onnx.load_from_string(classifier_onnx(weights()))
    long = {name: f"module.some.long.path.{name}" for name in ("hidden", "active", "flat", "conv", "dense")}
    for node in model.graph.node:
        node.name, node.doc_string = f"node_{node.op_type}", "/home/someone/train.py"
        node.input[:] = [long.get(name, name) for name in node.input]
        node.output[:] = [long.get(name, name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = long.get(tensor.name, tensor.name)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    model.metadata_props.add(key="source", value="/home/someone/train.py")
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def test_an_onnx_file_keeps_its_answers_and_the_names_of_its_edges():
    content = noted_onnx()
    small = strip_onnx(content)
    x = images(4)
    assert run_onnx(small, x=x)[0].tobytes() == run_onnx(content, x=x)[0].tobytes()
    model = onnx.load_from_string(small)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert not any(node.name for node in model.graph.node)
    assert not model.graph.value_info
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 17)]
    assert not re.search(rb"module|someone|node_", small)
    assert len(small) < len(content)


def test_an_inner_graph_still_reads_what_the_outer_one_computed():
    def branch(name, kind):
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["shared", "weight"], [f"{name}_out"])], name, [], [out])

    nodes = [
        helper.make_node("Relu", ["x"], ["shared"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["test"]),
        helper.make_node("If", ["test"], ["y"], then_branch=branch("yes", "Add"), else_branch=branch("no", "Mul")),
    ]
    tensors = [
        numpy_helper.from_array(np.float32([2.0, 3.0]), "weight"),
        numpy_helper.from_array(np.float32(0.0), "zero"),
    ]
    content = onnx_model(nodes, [("x", "float32", [2])], [("y", "float32", [2])], tensors).SerializeToString()
    small = strip_onnx(content)
    for x in ([1.0, 2.0], [-3.0, 1.0]):
        np.testing.assert_array_equal(run_onnx(small, x=np.float32(x))[0], run_onnx(content, x=np.float32(x))[0])
    assert b"shared" not in small


def test_a_new_name_is_none_that_the_file_is_known_by():
    nodes = [helper.make_node("Relu", ["0"], ["inner"]), helper.make_node("Neg", ["inner"], ["1"])]
    content = onnx_model(nodes, [("0", "float32", [2])], [("1", "float32", [2])]).SerializeToString()
    np.testing.assert_array_equal(run_onnx(strip_onnx(content), **{"0": np.float32([1.0, -2.0])})[0], [-1.0, 0.0])


def test_a_tflite_file_without_a_signature_keeps_the_names_of_its_edges():
    model = parsed_tflite(classifier_tflite(weights()))
    for tensor in model.subgraphs[0].tensors:
        if tensor.name not in (b"x", b"y"):
            tensor.name = b"litert_torch.convert.Wrapper/some.module.path/" + tensor.name
    content = packed_tflite(model)
    small = strip_tflite(content)
    x = images(1).transpose(0, 2, 3, 1)
    assert run_tflite(small, x)[:2] == ("x", "y")
    assert run_tflite(small, x)[2].tobytes() == run_tflite(content, x)[2].tobytes()
    assert b"module" not in small and b"tiny" not in small
    assert len(small) < len(content)
    assert [tensor.name for tensor in parsed_tflite(small).subgraphs[0].tensors if tensor.name] == [b"x", b"y"]


def test_weights_are_stored_once_and_aligned():
    model = parsed_tflite(classifier_tflite(weights()))
    again = schema.BufferT()
    again.data = model.buffers[1].data
    model.buffers += [again, schema.BufferT()]
    model.subgraphs[0].tensors[1].buffer = len(model.buffers) - 2
    model.subgraphs[0].tensors[3].buffer = len(model.buffers) - 1
    content = packed_tflite(model)
    small = strip_tflite(content)
    read = schema.Model.GetRootAs(small, 0)
    assert read.BuffersLength() == 5  # the empty one, and four weights
    assert read.Buffers(0).DataIsNone()
    base = np.frombuffer(small, np.uint8).__array_interface__["data"][0]
    for at in range(1, read.BuffersLength()):
        place = read.Buffers(at).DataAsNumpy().__array_interface__["data"][0] - base
        assert place % ALIGNMENT == 0
    x = images(1).transpose(0, 2, 3, 1)
    assert run_tflite(small, x)[2].tobytes() == run_tflite(content, x)[2].tobytes()


def test_an_entry_that_changes_how_delegates_compute_stays():
    model = parsed_tflite(classifier_tflite(weights()))
    model.metadata = []
    for name in (b"min_runtime_version", b"reduced_precision_support"):
        entry, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = np.frombuffer(name, np.uint8)
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    read = parsed_tflite(strip_tflite(packed_tflite(model)))
    assert [item.name for item in read.metadata] == [b"reduced_precision_support"]
    assert read.buffers[read.metadata[0].buffer].data.tobytes() == b"reduced_precision_support"
