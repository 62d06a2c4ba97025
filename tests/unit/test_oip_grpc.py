"""The protocol over gRPC: the bytes that Triton's own messages have, and no bytes get further than a typed error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import service_pb2

from outrider_runtimes import oip, oip_grpc
from outrider_runtimes._grpc_messages import _MESSAGES, MAX_FIELDS, UNCOUNTED_BYTES, message_class
from outrider_runtimes.errors import InputError, ReplyError
from outrider_runtimes.protowire import bytes_field, uint_field
from outrider_runtimes.tensors import DTYPES, Interface, TensorSpec
from support.effort import effort
from support.peaks import peak_bytes

INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 2), axes="NC"),),
    outputs=(TensorSpec(name="y", dtype="int64", shape=(None,), axes="N", meaning="counts"),),
    labels=("a", "b"),
)


def tensors():
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    arrays = st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes))
    names = st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable())
    return st.dictionaries(names, arrays, min_size=1, max_size=4)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name, array in left.items():
        assert (right[name].dtype, right[name].shape) == (array.dtype, array.shape)
        assert right[name].tobytes() == array.tobytes()
        assert right[name].flags.writeable


@pytest.mark.parametrize("name", _MESSAGES)
def test_every_field_is_tritons(name):
    """Numbers, types and repetition are those of tritonclient's own stubs; `properties` is the protocol's."""
    ours = message_class(name).DESCRIPTOR
    theirs = service_pb2
    for part in name.split("."):
        theirs = getattr(theirs, part)
    expected = {f.name: f for f in theirs.DESCRIPTOR.fields}
    assert {f.name for f in ours.fields} - {"properties"} == set(expected)
    for field in ours.fields:
        if field.name == "properties":
            continue
        peer = expected[field.name]
        assert (field.number, field.type, field.is_repeated) == (peer.number, peer.type, peer.is_repeated), field.name
        if field.message_type is not None:
            assert field.message_type.full_name == peer.message_type.full_name
        assert (field.containing_oneof is None) == (peer.containing_oneof is None)


def test_every_method_is_tritons():
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == oip_grpc.SERVICE
    assert {method.name for method in service.methods} == {*oip_grpc.SERVED, *oip_grpc.NOT_SERVED}
    assert [m.name for m in service.methods if m.client_streaming or m.server_streaming] == [oip_grpc.NOT_SERVED[0]]
    for name in oip_grpc.SERVED:
        method = service.methods_by_name[name]
        assert (method.input_type.name, method.output_type.name) == (f"{name}Request", f"{name}Response")


@settings(max_examples=effort(100), deadline=None)
@given(tensors(), st.integers(1, oip.MAX_TIMEOUT_US) | st.none())
def test_a_request_comes_back_as_it_went(inputs, timeout_us):
    data = oip_grpc.encode_request(inputs, model="m", version="3", id="7", timeout_us=timeout_us)
    call = oip_grpc.decode_request(data)
    assert (call.model, call.version, call.request.id, call.request.timeout_us) == ("m", "3", "7", timeout_us)
    assert call.request.outputs is None and call.request.binary
    same(inputs, call.request.inputs)
    theirs = service_pb2.ModelInferRequest.FromString(data)
    assert [t.name for t in theirs.inputs] == list(inputs)
    assert [bytes(raw) for raw in theirs.raw_input_contents] == [array.tobytes() for array in inputs.values()]


@settings(max_examples=effort(100), deadline=None)
@given(tensors())
def test_a_reply_comes_back_as_it_went(outputs):
    request = oip.Request(id="1", inputs={})
    said = {"infer_ms": 1.5, "bundle": "b", "rows": 3, "warm": True}
    data = oip_grpc.encode_reply(outputs, model="m", version="3", request=request, parameters=said)
    reply = oip_grpc.decode_reply(data)
    assert (reply.model, reply.version, reply.id, reply.parameters) == ("m", "3", "1", said)
    same(outputs, reply.outputs)
    assert service_pb2.ModelInferResponse.FromString(data).SerializeToString(deterministic=True)


def test_memory_order_and_byte_order_do_not_matter():
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    for given_ in (array, np.asfortranarray(array), array[:, ::-1]):
        decoded = oip_grpc.decode_request(oip_grpc.encode_request({"x": given_}, model="m")).request.inputs["x"]
        np.testing.assert_array_equal(decoded, given_)
        assert decoded.dtype.isnative and decoded.flags.aligned


TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [-1.5, 2.0**127]),
    "FP64": ("fp64_contents", [-1.5, 1e300]),
}


def typed(datatype: str, field: str, values: list, shape: list[int] | None = None) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype=datatype, shape=[len(values)] if shape is None else shape)
    getattr(tensor.contents, field).extend(values)
    return message


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_are_taken_too(datatype):
    field, values = TYPED[datatype]
    decoded = oip_grpc.decode_request(typed(datatype, field, values).SerializeToString()).request.inputs["x"]
    assert decoded.dtype == oip.DTYPES[datatype] and decoded.tolist() == values


def test_what_is_asked_for_is_told():
    message = typed("FP32", "fp32_contents", [1.0])
    message.id = "9"
    message.parameters["timeout"].int64_param = 5000
    message.outputs.add(name="b")
    message.outputs.add(name="a")
    request = oip_grpc.decode_request(message.SerializeToString()).request
    assert (request.id, request.timeout_us, list(request.outputs)) == ("9", 5000, ["b", "a"])
    outputs = {name: np.array([1.0], np.float32) for name in "abc"}
    data = oip_grpc.encode_reply(outputs, model="m", version="1", request=request, parameters={})
    assert list(oip_grpc.decode_reply(data).outputs) == ["b", "a"]
    with pytest.raises(InputError, match="no output 'b'"):
        oip_grpc.encode_reply({"a": outputs["a"]}, model="m", version="1", request=request, parameters={})


def raw(*contents: bytes, **changes) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=contents)
    message.inputs.add(**({"name": "x", "datatype": "FP32", "shape": [2]} | changes))
    return message


def both() -> service_pb2.ModelInferRequest:
    message = typed("FP32", "fp32_contents", [1.0])
    message.raw_input_contents.append(b"\0" * 4)
    return message


def with_parameter(where: str, key: str, **value) -> service_pb2.ModelInferRequest:
    message = typed("FP32", "fp32_contents", [1.0])
    holder = {"request": message, "input": message.inputs[0]}.get(where) or message.outputs.add(name="y")
    holder.parameters[key].MergeFrom(service_pb2.InferParameter(**value))
    return message


def twice() -> service_pb2.ModelInferRequest:
    message = typed("FP32", "fp32_contents", [1.0])
    message.inputs.append(message.inputs[0])
    return message


BAD = {
    "no tensors": service_pb2.ModelInferRequest(model_name="m"),
    "a name twice": twice(),
    "257 tensors": service_pb2.ModelInferRequest(
        inputs=[service_pb2.ModelInferRequest.InferInputTensor(name=str(n), datatype="FP32") for n in range(257)]
    ),
    "no name": raw(b"\0" * 8, name=""),
    "long name": raw(b"\0" * 8, name="x" * 257),
    "long id": service_pb2.ModelInferRequest(id="x" * 257, inputs=raw(b"").inputs, raw_input_contents=[b"\0" * 8]),
    "BYTES": raw(b"\xff\xff\xff\xff", datatype="BYTES", shape=[1]),
    "typed BYTES": typed("BYTES", "bytes_contents", [b"a"]),
    "unknown datatype": raw(b"\0" * 8, datatype="FP128"),
    "negative size": raw(b"\0" * 8, shape=[-2]),
    "a size of 2^63 - 1": raw(b"\0" * 8, shape=[2**63 - 1]),
    "a huge shape": raw(b"\0" * 8, shape=[2**30, 2**30]),
    "rank 17": raw(b"\0" * 8, shape=[1] * 16 + [2]),
    "too few bytes": raw(b"\0" * 7),
    "too many bytes": raw(b"\0" * 9),
    "more contents than tensors": raw(b"\0" * 8, b""),
    "raw and typed": both(),
    "neither": raw(),
    "typed FP16": typed("FP16", "fp32_contents", [1.0]),
    "another field": typed("FP32", "fp64_contents", [1.0]),
    "too few elements": typed("FP32", "fp32_contents", [1.0], [2]),
    "int8 too big": typed("INT8", "int_contents", [128]),
    "uint16 too big": typed("UINT16", "uint_contents", [2**16]),
    "typed NaN": typed("FP32", "fp32_contents", [float("nan")]),
    "a bool of 2": raw(b"\2", datatype="BOOL", shape=[1]),
    "timeout negative": with_parameter("request", "timeout", int64_param=-1),
    "timeout text": with_parameter("request", "timeout", string_param="5"),
    "shared memory in": with_parameter("input", "shared_memory_region", string_param="a"),
    "shared memory out": with_parameter("output", "shared_memory_region", string_param="a"),
    "classification": with_parameter("output", "classification", int64_param=3),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused(name):
    with pytest.raises(InputError):
        oip_grpc.decode_request(BAD[name].SerializeToString())


BROKEN = {
    "no message": b"\xff\xff\xff\xff",
    "a length beyond the end": b"\x0a\x7f",
    "a group": b"\x0b\x0c",
    "not UTF-8": bytes_field(1, b"\xff"),
    "a broken tensor": bytes_field(5, b"\xff\xff"),
    "a thousand empty tensors": bytes_field(5, b"") * 1_000,
    "a million empty tensors": bytes_field(5, b"") * 1_000_000,
    "a hundred thousand unknown fields": uint_field(99, 1) * 100_000,
    "ten million bytes of shape": bytes_field(5, bytes_field(3, b"\1" * 10_000_000)),
    "parameters without end": bytes_field(4, bytes_field(1, b"a" * 1_000_000)) * 20,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bytes_are_refused_before_they_cost_memory(name):
    """tracemalloc sees Python's share alone; protobuf is not given any of these but the shortest."""
    data = BROKEN[name]
    limits = oip.Limits(json_bytes=1 << 20)

    def decode() -> None:
        with pytest.raises(InputError):
            oip_grpc.decode_request(data, limits=limits)
        with pytest.raises(ReplyError):
            oip_grpc.decode_reply(data, limits=limits)

    assert peak_bytes(decode) < 4 << 20


def test_bounds_are_named():
    with pytest.raises(InputError, match="the message has 11 bytes, at most 10"):
        oip_grpc.decode_request(b"\0" * 11, limits=oip.Limits(body_bytes=10))
    with pytest.raises(InputError, match=f"more than {MAX_FIELDS} fields"):
        oip_grpc.decode_request(uint_field(9, 1) * UNCOUNTED_BYTES)
    with pytest.raises(InputError, match="bytes outside its raw tensors"):
        oip_grpc.decode_request(bytes_field(1, b"m" * 100), limits=oip.Limits(json_bytes=99))


def test_a_raw_tensor_counts_as_body_only():
    data = oip_grpc.encode_request({"x": np.zeros(10_000, np.float32)}, model="m")
    assert oip_grpc.decode_request(data, limits=oip.Limits(json_bytes=100)).request.inputs["x"].size == 10_000


@settings(max_examples=effort(200), deadline=None)
@given(st.data())
def test_mutated_messages_are_decoded_or_refused(data):
    body = bytearray(oip_grpc.encode_request({"x": np.zeros((2, 3), np.float32), "f": np.array([True])}, model="m"))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        call = oip_grpc.decode_request(bytes(body))
    except InputError:
        return
    assert sum(array.nbytes for array in call.request.inputs.values()) <= len(body) * 8


@settings(max_examples=effort(100), deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data):
    for decode in (oip_grpc.decode_reply, oip_grpc.decode_model_metadata):
        try:
            decode(data)
        except ReplyError:
            continue


def test_metadata_carries_the_interface_whole():
    ours = {"interface": INTERFACE.to_dict(), "interface_digest": INTERFACE.digest, "bundle": "b"}
    document = oip.model_metadata("m", INTERFACE, versions=[3, 4], platform="outrider", parameters=ours)
    data = oip_grpc.encode_model_metadata(document)
    assert oip_grpc.decode_model_metadata(data) == document
    assert oip.interface_from_metadata(oip_grpc.decode_model_metadata(data)) == INTERFACE
    theirs = service_pb2.ModelMetadataResponse.FromString(data)
    assert (list(theirs.versions), list(theirs.inputs[0].shape)) == (["3", "4"], [-1, 2])


def test_a_foreign_servers_metadata_becomes_an_interface():
    message = service_pb2.ModelMetadataResponse(name="m", versions=["1"], platform="onnx")
    message.inputs.add(name="x", datatype="FP32", shape=[-1, 2])
    message.outputs.add(name="y", datatype="INT64", shape=[-1])
    data = message.SerializeToString()
    # Some servers have messages where the protocol has strings.
    data += bytes_field(6, bytes_field(1, b"k") + bytes_field(2, b"\x08\xff"))
    found = oip.interface_from_metadata(oip_grpc.decode_model_metadata(data))
    assert [(s.name, s.dtype, s.shape) for s in found.inputs] == [("x", "float32", (None, 2))]
    with pytest.raises(ReplyError):
        oip_grpc.decode_model_metadata(bytes_field(6, bytes_field(1, b"outrider") + bytes_field(2, b"{")))


def test_small_messages_go_both_ways():
    data = oip_grpc.encode("ServerMetadataResponse", name="outrider", version="1", extensions=["a", "b"])
    assert list(service_pb2.ServerMetadataResponse.FromString(data).extensions) == ["a", "b"]
    asked = service_pb2.ModelReadyRequest(name="m", version="2").SerializeToString()
    assert oip_grpc.decode("ModelReadyRequest", asked, InputError).version == "2"
    assert oip_grpc.path("ServerLive") == "/inference.GRPCInferenceService/ServerLive"


def test_a_message_that_no_server_takes_is_not_made(monkeypatch):
    monkeypatch.setattr(oip_grpc, "MAX_SENT_BYTES", 100)
    oip_grpc.encode_request({"x": np.zeros(25, np.float32)}, model="m")
    with pytest.raises(InputError, match="'y'"):
        oip_grpc.encode_request({"x": np.zeros(20, np.float32), "y": np.zeros(6, np.float32)}, model="m")


def test_a_request_says_which_model_it_is_for_before_it_is_decoded():
    data = oip_grpc.encode_request({"x": np.zeros((2, 3), np.float32)}, model="digits", version="7", id="1")
    assert oip_grpc.called(data) == ("digits", "7")
    assert oip_grpc.called(data + b"\xff\xff\xff") == ("digits", "7")
    assert oip_grpc.called(b"") == ("", "")
    assert oip_grpc.called(bytes_field(3, b"") * MAX_FIELDS + bytes_field(1, b"digits")) == ("", "")
    for bad in (b"\xff\xff\xff", bytes_field(1, b"\xff"), bytes_field(1, b"digits")[:-1]):
        with pytest.raises(InputError, match="not a ModelInferRequest"):
            oip_grpc.called(bad)
