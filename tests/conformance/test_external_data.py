"""An ONNX file that keeps tensors elsewhere is refused, and nothing that it names is opened."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from outrider_runtimes.engines import _protobuf, engine_named
from outrider_runtimes.errors import ModelLoadError
from support.models import onnx_linear, onnx_model

WEIGHTS = np.arange(4, dtype=np.float32)


def external(location, name="w"):
    tensor = numpy_helper.from_array(WEIGHTS, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def add(nodes=(), tensors=()):
    nodes = [*nodes, helper.make_node("Add", ["x", "w"], ["y"])]
    return onnx_model(nodes, [("x", "float32", ["N", 4])], [("y", "float32", ["N", 4])], tensors)


def as_initializer(location):
    return add(tensors=[external(location)])


def as_constant(location):
    return add(nodes=[helper.make_node("Constant", [], ["w"], value=external(location))])


def in_a_branch(location):
    one = helper.make_node("Constant", [], ["b"], value=external(location, "b"))
    info = helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])
    branch = helper.make_graph([one], "branch", [], [info])
    condition = numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    return add(nodes=[node], tensors=[condition])


def in_a_function(location):
    constant = helper.make_node("Constant", [], ["out"], value=external(location, "k"))
    function = helper.make_function("own", "F", [], ["out"], [constant], [helper.make_opsetid("", 17)])
    model = add(nodes=[helper.make_node("F", [], ["w"], domain="own")])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def in_a_sparse_tensor(location):
    model = add(tensors=[numpy_helper.from_array(WEIGHTS, "w")])
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external(location, "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4), "i"))
    sparse.dims.append(4)
    return model


PLACES = [as_initializer, as_constant, in_a_branch, in_a_function, in_a_sparse_tensor]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder and the model's, with the data as a file, behind a link, a hard link and above."""
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "above.bin").write_bytes(WEIGHTS.tobytes())
    (inside / "file.bin").write_bytes(WEIGHTS.tobytes())
    (inside / "symlink.bin").symlink_to(tmp_path / "above.bin")
    os.link(tmp_path / "above.bin", inside / "hardlink.bin")
    (inside / "up").symlink_to(tmp_path)
    monkeypatch.chdir(inside)
    return inside


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize(
    "location",
    ["file.bin", "symlink.bin", "hardlink.bin", "../above.bin", "up/above.bin", "absolute", "", "absent.bin"],
)
def test_external_data_is_refused(folder, place, location):
    path = folder / "model.onnx"
    path.write_bytes(place(str(folder / "file.bin") if location == "absolute" else location).SerializeToString())
    with pytest.raises(ModelLoadError, match="external data") as caught:
        engine_named("onnxruntime").prepare(path, threads=1)
    assert "one file" in caught.value.hint


def test_entries_without_the_flag_and_the_flag_without_entries_are_refused(folder):
    for clear in ("data_location", "external_data"):
        model = as_initializer("file.bin")
        model.graph.initializer[0].ClearField(clear)
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelLoadError, match="external data"):
            engine_named("onnxruntime").prepare(path, threads=1)


def a_compiled_graph(**where):
    """A node that ONNX Runtime writes for an accelerator; ``ep_cache_context`` is the name of a file or its bytes."""
    return helper.make_node("EPContext", ["x"], ["w"], domain="com.microsoft", **where)


@pytest.mark.parametrize("embed_mode", [0, 1])
def test_a_compiled_graph_may_name_a_file_and_is_refused(tmp_path, embed_mode):
    node = a_compiled_graph(embed_mode=embed_mode, ep_cache_context="../above.bin")
    inner = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])])
    condition = numpy_helper.from_array(np.array(True), "c")
    branches = helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner)
    for model in (add(nodes=[node]), add(nodes=[branches], tensors=[condition])):
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelLoadError, match="EPContext operator, which may name other files") as caught:
            engine_named("onnxruntime").prepare(path, threads=1)
        assert "compiled" in caught.value.hint


def test_another_node_of_that_name_is_none(tmp_path):
    path = tmp_path / "model.onnx"
    node = helper.make_node("Identity", ["x"], ["w"], name="EPContext", doc_string="EPContext")
    path.write_bytes(add(nodes=[node]).SerializeToString())
    session = engine_named("onnxruntime").prepare(path, threads=1)
    (answer,) = session.run([np.ones((1, 4), np.float32)])
    assert answer.tolist() == [[2.0] * 4]
    session.close()


def test_the_walk_knows_every_field_that_leads_to_a_tensor():
    """Compared with onnx's own description of the format, so that a new field is seen."""
    messages = {
        "ModelProto": "Model",
        "TrainingInfoProto": "Training",
        "FunctionProto": "Function",
        "GraphProto": "Graph",
        "NodeProto": "Node",
        "AttributeProto": "Attribute",
        "SparseTensorProto": "Sparse",
        "TensorProto": "Tensor",
    }
    for message, ours in messages.items():
        fields = getattr(onnx, message).DESCRIPTOR.fields
        leading = {
            field.number: messages[field.message_type.name]
            for field in fields
            if field.message_type is not None and field.message_type.name in messages
        }
        assert _protobuf._MESSAGES[ours] == leading, message
    assert onnx.NodeProto.DESCRIPTOR.fields_by_name["op_type"].number == _protobuf._NODE_OPERATOR


def test_ort_format_bytes_are_not_taken_for_a_model(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x10\0\0\0ORTM" + b"\0" * 64)
    with pytest.raises(ModelLoadError):
        engine_named("onnxruntime").prepare(path, threads=1)


def test_deep_nesting_is_refused_not_followed():
    data = b""
    for _ in range(200):  # graph { node { attribute { g { ...
        for number in (6, 5, 1):
            data = bytes([number << 3 | 2]) + _length(len(data)) + data
    with pytest.raises(ModelLoadError):
        _protobuf.refuse_external_data(b"\x3a" + _length(len(data)) + data, where="deep")


@given(st.binary(max_size=400))
def test_any_bytes_are_walked_or_refused(data):
    try:
        _protobuf.refuse_external_data(data, where="fuzz")
    except ModelLoadError as error:
        assert "fuzz" in str(error)


@given(st.data())
def test_a_mutated_model_is_walked_or_refused(tmp_path_factory, data):
    good = onnx_linear(tmp_path_factory.mktemp("m") / "m.onnx").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    try:
        _protobuf.refuse_external_data(bad, where="fuzz")
    except ModelLoadError as error:
        assert "fuzz" in str(error)


def _length(size):
    out = b""
    while size >= 0x80:
        out += bytes([size & 0x7F | 0x80])
        size >>= 7
    return out + bytes([size])
