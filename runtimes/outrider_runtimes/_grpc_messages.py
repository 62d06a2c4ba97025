"""The messages of the Open Inference Protocol over gRPC, in a descriptor pool of their own.

``tritonclient`` and other clients register files of the same package in protobuf's default pool, where any two of them
clash. Field numbers: ``grpc_service.proto`` of the Triton server and ``open_inference_grpc.proto`` of the protocol.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from outrider_runtimes.errors import MissingExtra
from outrider_runtimes.protowire import LENGTH, Malformed, fields
from outrider_runtimes.strictjson import Refuse

PACKAGE = "inference"
# A message may have each of its fields so often, and so many bytes outside its raw tensors.
MAX_FIELDS = 2_000
# Shorter messages are not counted: at their worst they take a few megabytes.
UNCOUNTED_BYTES = 32 << 10
RAW_FIELDS: Mapping[str, int] = {"ModelInferRequest": 7, "ModelInferResponse": 6}

_PARAMETERS = "parameters InferParameter{} "
_TENSOR = ("name string 1", "datatype string 2", "shape int64[] 3", f"{_PARAMETERS}4", "contents InferTensorContents 5")

# `name type number`; `[]` is repeated, `{}` is a map from strings.
_MESSAGES: Mapping[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live bool 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready bool 1",),
    "ModelReadyRequest": ("name string 1", "version string 2"),
    "ModelReadyResponse": ("ready bool 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name string 1", "version string 2", "extensions string[] 3"),
    "ModelMetadataRequest": ("name string 1", "version string 2"),
    "ModelMetadataResponse.TensorMetadata": ("name string 1", "datatype string 2", "shape int64[] 3"),
    "ModelMetadataResponse": (
        "name string 1",
        "versions string[] 2",
        "platform string 3",
        "inputs ModelMetadataResponse.TensorMetadata[] 4",
        "outputs ModelMetadataResponse.TensorMetadata[] 5",
        # Strings in the protocol; some servers put messages there, which as strings would fail the whole message.
        "properties bytes{} 6",
    ),
    "InferParameter": (
        "bool_param bool 1",
        "int64_param int64 2",
        "string_param string 3",
        "double_param double 4",
        "uint64_param uint64 5",
    ),
    "InferTensorContents": (
        "bool_contents bool[] 1",
        "int_contents int32[] 2",
        "int64_contents int64[] 3",
        "uint_contents uint32[] 4",
        "uint64_contents uint64[] 5",
        "fp32_contents float[] 6",
        "fp64_contents double[] 7",
        "bytes_contents bytes[] 8",
    ),
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": ("name string 1", f"{_PARAMETERS}2"),
    "ModelInferRequest": (
        "model_name string 1",
        "model_version string 2",
        "id string 3",
        f"{_PARAMETERS}4",
        "inputs ModelInferRequest.InferInputTensor[] 5",
        "outputs ModelInferRequest.InferRequestedOutputTensor[] 6",
        "raw_input_contents bytes[] 7",
    ),
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelInferResponse": (
        "model_name string 1",
        "model_version string 2",
        "id string 3",
        f"{_PARAMETERS}4",
        "outputs ModelInferResponse.InferOutputTensor[] 5",
        "raw_output_contents bytes[] 6",
    ),
}
# One of their fields at a time.
_ONE_OF: Mapping[str, str] = {"InferParameter": "parameter_choice"}


def message_class(name: str) -> Any:
    """The generated class of a message by its name in the protocol. Raises MissingExtra."""
    return _classes()[name]


def parsed(name: str, data: bytes, refuse: Refuse, *, max_bytes: int) -> Any:
    """A message from a stranger's bytes; what it would cost to hold is bounded before protobuf sees them.

    Two bytes can make an empty message of a hundred: fields are counted first, and ``max_bytes`` is for all but the raw
    tensors, whose memory is what they say.
    """
    if len(data) > min(UNCOUNTED_BYTES, max_bytes):
        _check_cost(name, data, refuse, max_bytes)
    try:
        return message_class(name).FromString(data)
    except Exception as error:  # DecodeError, which is of no fixed place in the packages of protobuf
        raise refuse(f"not a {name}: {str(error)[:120]}") from None


def _check_cost(name: str, data: bytes, refuse: Refuse, max_bytes: int) -> None:
    raw = RAW_FIELDS.get(name)
    left = max_bytes
    try:
        for count, (number, wire, value) in enumerate(fields(memoryview(data))):
            if count >= MAX_FIELDS:
                raise refuse(f"a {name} of more than {MAX_FIELDS} fields")
            if wire == LENGTH and number != raw:
                left -= len(value)  # type: ignore[arg-type]
    except Malformed:
        raise refuse(f"not a {name}: the bytes are not a protobuf message") from None
    if left < 0:
        raise refuse(f"a {name} has {max_bytes - left} bytes outside its raw tensors, at most {max_bytes} are taken")


@functools.cache
def _classes() -> dict[str, Any]:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise MissingExtra("protobuf", extra="grpc", purpose="gRPC") from None
    file = descriptor_pb2.FileDescriptorProto(name="outrider/oip.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda each: each.count(".")):
        outer, _, inner = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
    for name, message in made.items():
        if name in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[name])
        for line in _MESSAGES[name]:
            _add_field(message, f".{PACKAGE}.{name}", *line.split(), one_of=name in _ONE_OF)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in made}


def _add_field(message: Any, path: str, name: str, kind: str, number: str, *, one_of: bool) -> None:
    field = message.field.add(name=name, number=int(number), label=3 if kind[-1] in "]}" else 1)
    if one_of:
        field.oneof_index = 0
    if not kind.endswith("{}"):
        _set_type(field, kind.removesuffix("[]"))
        return
    entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
    entry.options.map_entry = True
    _set_type(entry.field.add(name="key", number=1, label=1), "string")
    _set_type(entry.field.add(name="value", number=2, label=1), kind.removesuffix("{}"))
    field.type, field.type_name = field.TYPE_MESSAGE, f"{path}.{entry.name}"


def _set_type(field: Any, kind: str) -> None:
    if kind in _MESSAGES:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
