"""The Open Inference Protocol v2 over gRPC, bytes to tensors and back, for both sides: what ``oip`` is for HTTP.

Service ``inference.GRPCInferenceService``. Messages come and go as bytes, so that a server and a client of ``grpc`` are
made with no serializers of their own: whatever a stranger sends is bounded here before protobuf takes it apart.
Tensors go out raw (``raw_input_contents``, ``raw_output_contents``: little-endian, in the order of their entries), and
come in raw or typed (``contents``). FP16 has no typed form. BYTES is taken for inputs that are files, as over HTTP.

Everything here is pure. Needs the extra ``[grpc]``; requests that break a rule raise InputError, replies ReplyError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from outrider_runtimes._grpc_messages import MAX_FIELDS, PACKAGE, RAW_FIELDS, message_class, parsed
from outrider_runtimes._oip_files import BYTES, Files
from outrider_runtimes._oip_tensors import (
    DEFAULT_LIMITS,
    MAX_TENSORS,
    Document,
    Limits,
    Rules,
    datatype_of,
    declaration,
    from_bytes,
    from_list,
    little_endian,
    text,
    timeout_us_of,
    wanted_outputs,
)
from outrider_runtimes.errors import InputError, ReplyError
from outrider_runtimes.oip import Reply, Request, decode_json
from outrider_runtimes.protowire import LENGTH, bytes_head, fields
from outrider_runtimes.strictjson import Refuse
from outrider_runtimes.tensors import Array, Tensors

SERVICE = f"{PACKAGE}.GRPCInferenceService"
# Each takes a message of its name with `Request` behind it, and gives one with `Response`.
SERVED = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
# What Triton's service has beyond the protocol; the first streams both ways. They are answered UNIMPLEMENTED.
NOT_SERVED = (
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)
# protobuf's own bound is 2^31 - 1; some room is for all that is not a raw tensor.
MAX_SENT_BYTES = 2**31 - 2**20

_TYPED: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A decoded ModelInferRequest: what HTTP says in its path, and the request. ``version`` is empty for any."""

    model: str
    version: str
    request: Request


def path(method: str) -> str:
    """The method's path, as ``grpc`` takes it."""
    return f"/{SERVICE}/{method}"


def encode(message: str, **fields: Any) -> bytes:
    """A small message, ``encode("ServerLiveResponse", live=True)``. Raises MissingExtra."""
    return _bytes(message_class(message)(**fields))


def decode(message: str, data: bytes, refuse: Refuse, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The inverse of ``encode``: an object with the message's fields. Raises what ``refuse`` makes, or MissingExtra."""
    return parsed(message, data, refuse, max_bytes=limits.json_bytes)


def encode_request(
    inputs: Tensors,
    *,
    model: str,
    version: str = "",
    id: str = "",
    timeout_us: int | None = None,
    outputs: Iterable[str] | None = None,
) -> bytes:
    """A ModelInferRequest.

    Args:
        version: empty for any.
        timeout_us: time left in microseconds.
        outputs: names of those that are asked for; None for all.

    Raises:
        InputError: more bytes than one message can have.
    """
    message = message_class("ModelInferRequest")(model_name=model, model_version=version, id=id)
    if timeout_us is not None:
        message.parameters["timeout"].int64_param = timeout_us
    for name in outputs or ():
        message.outputs.add(name=name)
    return _with_tensors("ModelInferRequest", message, message.inputs, inputs.items())


def decode_request(data: bytes, *, limits: Limits = DEFAULT_LIMITS, files: Files = MappingProxyType({})) -> Call:
    """The inverse of ``encode_request``.

    Args:
        limits: ``body_bytes`` for the message, ``json_bytes`` for what of it is not a raw tensor.
        files: as ``oip.decode_request`` takes them.

    Raises:
        InputError: bytes that the protocol or ``limits`` do not allow, or a datatype that is not served.
    """
    rules = Rules(refuse=InputError, limits=limits, files=files)
    message = _opened("ModelInferRequest", data, rules)
    for tensor in message.inputs:
        if "shared_memory_region" in tensor.parameters:
            raise InputError(f"tensor {tensor.name[:64]!r}: shared memory is not served", tensor=tensor.name[:64])
    names = [{"name": each.name, "parameters": _parameters(each.parameters)} for each in message.outputs]
    request = Request(
        id=_text(message, "id", InputError),
        inputs=_read_tensors(message.inputs, message.raw_input_contents, "inputs", rules),
        outputs=wanted_outputs({"outputs": names} if names else {}, True),
        binary=True,
        timeout_us=timeout_us_of(_parameters(message.parameters)),
    )
    return Call(
        model=_text(message, "model_name", InputError),
        version=_text(message, "model_version", InputError),
        request=request,
    )


def called(data: bytes) -> tuple[str, str]:
    """The model and version that a ModelInferRequest's bytes name, without decoding what it holds.

    The first of each within the first fields; a decoded message has the last, so that one who then compares them has
    both right.

    Raises:
        InputError: the bytes begin like no such message.
    """
    found: dict[int, str] = {}
    try:
        for number, wire, value in islice(fields(memoryview(data)), MAX_FIELDS):
            if wire == LENGTH and number in (1, 2):
                found.setdefault(number, bytes(value).decode())
            if len(found) == 2:
                break
    except ValueError:  # Malformed, and what is not UTF-8
        raise InputError("not a ModelInferRequest") from None
    return found.get(1, ""), found.get(2, "")


def encode_reply(
    outputs: Tensors, *, model: str, version: str, request: Request, parameters: Mapping[str, Any]
) -> bytes:
    """A ModelInferResponse: the reply to ``request``, with the outputs that it asks for, all raw.

    Raises:
        InputError: the request names an output that is not there, or the reply has more bytes than a message can.
    """
    message = message_class("ModelInferResponse")(model_name=model, model_version=version, id=request.id)
    for key, value in parameters.items():
        setattr(message.parameters[key], _choice(value), value)
    wanted = list(outputs) if request.outputs is None else list(request.outputs)
    for name in wanted:
        if name not in outputs:
            raise InputError(f"there is no output {name!r}", tensor=name, hint=f"the outputs are {list(outputs)}")
    return _with_tensors("ModelInferResponse", message, message.outputs, [(name, outputs[name]) for name in wanted])


def decode_reply(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Reply:
    """The inverse of ``encode_reply``. Raises ReplyError."""
    rules = Rules(refuse=ReplyError, limits=limits)
    message = _opened("ModelInferResponse", data, rules)
    return Reply(
        model=_text(message, "model_name", ReplyError),
        version=_text(message, "model_version", ReplyError),
        id=_text(message, "id", ReplyError),
        outputs=_read_tensors(message.outputs, message.raw_output_contents, "outputs", rules),
        parameters=_parameters(message.parameters),
    )


def encode_model_metadata(document: Document) -> bytes:
    """A ModelMetadataResponse from what ``oip.model_metadata`` makes; what is ours is one of its properties."""
    message = message_class("ModelMetadataResponse")(
        name=document["name"], versions=document["versions"], platform=document["platform"]
    )
    for key in ("inputs", "outputs"):
        for entry in document[key]:
            getattr(message, key).add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
    for name, value in document["parameters"].items():
        message.properties[name] = json.dumps(value, separators=(",", ":")).encode()
    return _bytes(message)


def decode_model_metadata(data: bytes) -> Document:
    """The inverse of ``encode_model_metadata``, for ``oip.interface_from_metadata``. Raises ReplyError."""
    message = decode("ModelMetadataResponse", data, ReplyError)
    document: Document = {"name": message.name, "versions": list(message.versions), "platform": message.platform}
    for key in ("inputs", "outputs"):
        document[key] = [
            {"name": each.name, "datatype": each.datatype, "shape": list(each.shape)} for each in getattr(message, key)
        ]
    ours = message.properties.get("outrider", b"")
    if ours:
        document["parameters"] = {"outrider": decode_json(ours, ReplyError)}
    return document


def _opened(name: str, data: bytes, rules: Rules) -> Any:
    if len(data) > rules.limits.body_bytes:
        raise rules.refuse(f"the message has {len(data)} bytes, at most {rules.limits.body_bytes} are taken")
    return decode(name, data, rules.refuse, limits=rules.limits)


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _with_tensors(kind: str, message: Any, entries: Any, tensors: Iterable[tuple[str, Array]]) -> bytes:
    """The message's bytes with the raw tensors behind them, which are copied once."""
    raw: list[bytes | memoryview] = []
    room = MAX_SENT_BYTES
    for name, array in tensors:
        room -= array.nbytes
        if room < 0:
            raise InputError(f"tensor {name!r}: one message cannot have {MAX_SENT_BYTES} bytes or more", tensor=name)
        entries.add(name=name, datatype=datatype_of(array), shape=array.shape)
        raw += [bytes_head(RAW_FIELDS[kind], array.nbytes), little_endian(array)]
    return b"".join([_bytes(message), *raw])


def _read_tensors(entries: Sequence[Any], raw: Sequence[bytes], key: str, rules: Rules) -> dict[str, Array]:
    refuse = rules.refuse
    if not 0 < len(entries) <= MAX_TENSORS:
        raise refuse(f"{key!r} has {len(entries)} tensors, not 1 to {MAX_TENSORS}")
    if raw and len(raw) != len(entries):
        raise refuse(f"{key!r} has {len(entries)} tensors and {len(raw)} raw contents")
    tensors: dict[str, Array] = {}
    for at, entry in enumerate(entries):
        declared = declaration({"name": entry.name, "datatype": entry.datatype, "shape": list(entry.shape)}, key, rules)
        if declared.name in tensors:
            raise refuse(f"tensor {declared.name!r} is listed twice")
        if not raw:
            tensors[declared.name] = from_list(declared, _typed(entry, refuse), rules)
        elif entry.HasField("contents"):
            raise refuse(f"tensor {declared.name!r} has both raw and typed contents")
        else:
            body = raw[at]
            tensors[declared.name] = from_bytes(declared, body, 0, len(body), rules)
    return tensors


def _typed(entry: Any, refuse: Refuse) -> list[Any]:
    own = _TYPED.get(entry.datatype)
    if own is None:
        raise refuse(f"tensor {entry.name!r}: {entry.datatype} has no typed contents, only raw ones")
    for field, _ in entry.contents.ListFields():
        if field.name != own:
            raise refuse(f"tensor {entry.name!r}: {field.name} stands where {entry.datatype} is declared")
    return list(getattr(entry.contents, own))


def _parameters(values: Mapping[str, Any]) -> Document:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in values.items()}
    return {name: getattr(values[name], choice) for name, choice in chosen.items() if choice}


def _choice(value: object) -> str:
    if isinstance(value, bool):
        return "bool_param"
    return {int: "int64_param", float: "double_param"}.get(type(value), "string_param")


def _text(message: Any, key: str, refuse: Refuse) -> str:
    return text({key: getattr(message, key)}, key, refuse)
