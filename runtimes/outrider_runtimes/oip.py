"""The Open Inference Protocol v2, bytes to tensors and back, for both sides.

A message is a JSON document; with the binary tensor extension the raw little-endian tensors follow it in the order in
which the document lists them, and the header ``Inference-Header-Content-Length`` says where the document ends.

Everything here is pure. Nothing is allocated by what a message declares: sizes are compared with the bytes that are
there first. Requests that break a rule raise InputError, replies ReplyError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outrider_runtimes._oip_tensors import (
    DATATYPES,
    DEFAULT_LIMITS,
    DTYPES,
    LENGTH_HEADER,
    MAX_NAME,
    MAX_TENSORS,
    Bytes,
    Document,
    Limits,
    Rules,
    decode_json,
    mapping,
    open_body,
    read_tensors,
)
from outrider_runtimes.errors import FormatError, InputError, NotFiniteError, ReplyError
from outrider_runtimes.strictjson import Refuse
from outrider_runtimes.tensors import Array, Interface, Tensors, TensorSpec

__all__ = [
    "BINARY_EXTENSION",
    "DATATYPES",
    "DEFAULT_LIMITS",
    "DTYPES",
    "LENGTH_HEADER",
    "MAX_NAME",
    "MAX_TIMEOUT_US",
    "Limits",
    "Message",
    "Reply",
    "Request",
    "check_reply",
    "decode_json",
    "decode_reply",
    "decode_request",
    "encode_reply",
    "encode_request",
    "interface_from_metadata",
    "model_metadata",
    "ours_in",
]

BINARY_EXTENSION = "binary_tensor_data"

MAX_TIMEOUT_US = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A body to send; ``json_bytes`` is the value of ``LENGTH_HEADER``, None where the body is JSON alone."""

    body: bytes
    json_bytes: int | None

    @property
    def headers(self) -> dict[str, str]:
        """Content type, and the length of the JSON part where tensors follow it."""
        if self.json_bytes is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(self.json_bytes)}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A decoded inference request.

    Attributes:
        id: to be echoed; empty when there was none.
        inputs: the tensors by name; the receiver's own memory.
        outputs: per requested output whether it is wanted in binary; None when all are wanted.
        binary: whether outputs go out in binary where nothing else is said.
        timeout_us: time the caller has left, in microseconds; None when it did not say.
    """

    id: str
    inputs: dict[str, Array]
    outputs: Mapping[str, bool] | None = None
    binary: bool = False
    timeout_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A decoded inference reply; ``outputs`` are the receiver's own memory."""

    model: str
    version: str
    id: str
    outputs: dict[str, Array]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def encode_request(inputs: Tensors, *, id: str = "", timeout_us: int | None = None, binary: bool = True) -> Message:
    """A request for all outputs.

    Args:
        inputs: tensors by name, finite where ``binary`` is false.
        timeout_us: time left in microseconds.
        binary: whether tensors travel in binary, both ways.

    Raises:
        NotFiniteError: a value that JSON cannot express.
    """
    parameters: Document = {}
    if timeout_us is not None:
        parameters["timeout"] = timeout_us
    if binary:
        parameters["binary_data_output"] = True
    document: Document = {"id": id} if id else {}
    if parameters:
        document["parameters"] = parameters
    return _encode(document, "inputs", ((name, array, binary) for name, array in inputs.items()))


def decode_request(body: Bytes, json_bytes: int | None, *, limits: Limits = DEFAULT_LIMITS) -> Request:
    """The inverse of ``encode_request``.

    Args:
        body: the whole body.
        json_bytes: the value of ``LENGTH_HEADER``; None when the header was not sent.

    Raises:
        InputError: bytes that the protocol or ``limits`` do not allow, or a datatype that is not served.
    """
    rules = Rules(refuse=InputError, limits=limits)
    document, start = open_body(body, json_bytes, rules)
    parameters = mapping(document, "parameters", InputError)
    return Request(
        id=_string(document, "id", InputError),
        inputs=read_tensors(document, "inputs", body, start, rules),
        outputs=_wanted(document, _flag(parameters, "binary_data_output")),
        binary=_flag(parameters, "binary_data_output"),
        timeout_us=_timeout(parameters),
    )


def encode_reply(
    outputs: Tensors,
    *,
    model: str,
    version: str,
    request: Request,
    parameters: Mapping[str, Any],
) -> Message:
    """The reply to ``request``, with the outputs that it asks for, each in the form that it asks for.

    Raises:
        InputError: the request names an output that is not there.
        NotFiniteError: a value that JSON cannot express.
    """
    document: Document = {"model_name": model, "model_version": version}
    if request.id:
        document["id"] = request.id
    if parameters:
        document["parameters"] = dict(parameters)
    wanted = dict.fromkeys(outputs, request.binary) if request.outputs is None else request.outputs
    for name in wanted:
        if name not in outputs:
            raise InputError(f"there is no output {name!r}", tensor=name, hint=f"the outputs are {list(outputs)}")
    return _encode(document, "outputs", ((name, outputs[name], binary) for name, binary in wanted.items()))


def decode_reply(body: Bytes, json_bytes: int | None, *, limits: Limits = DEFAULT_LIMITS) -> Reply:
    """The inverse of ``encode_reply``. Raises ReplyError."""
    rules = Rules(refuse=ReplyError, limits=limits)
    document, start = open_body(body, json_bytes, rules)
    return Reply(
        model=_string(document, "model_name", ReplyError),
        version=_string(document, "model_version", ReplyError),
        id=_string(document, "id", ReplyError),
        outputs=read_tensors(document, "outputs", body, start, rules),
        parameters=mapping(document, "parameters", ReplyError),
    )


def check_reply(interface: Interface, reply: Reply, *, id: str, rows: int | None) -> dict[str, Array]:
    """The reply's outputs in the interface's order.

    Args:
        id: the request's.
        rows: the request's N; None where no input is batched.

    Raises:
        ReplyError: another id, names, dtypes or shapes than the interface's, or values that are not finite.
    """
    if reply.id != id:
        raise ReplyError(f"the reply's id is {reply.id[:64]!r}, the request's {id!r}")
    if set(reply.outputs) != {spec.name for spec in interface.outputs}:
        expected = [spec.name for spec in interface.outputs]
        raise ReplyError(f"the reply has the outputs {sorted(reply.outputs)[:16]}, expected {expected}")
    for spec in interface.outputs:
        _check_output(spec, reply.outputs[spec.name], rows)
    return {spec.name: reply.outputs[spec.name] for spec in interface.outputs}


def model_metadata(
    name: str, interface: Interface, *, versions: Iterable[int], platform: str, parameters: Mapping[str, Any]
) -> Document:
    """What ``GET /v2/models/<name>`` answers; None in a shape becomes -1."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": platform,
        "inputs": [_described(spec) for spec in interface.inputs],
        "outputs": [_described(spec) for spec in interface.outputs],
        "parameters": {"outrider": dict(parameters)},
    }


def interface_from_metadata(document: Mapping[str, Any]) -> Interface:
    """The interface of a served model: the one it states where the server is ours, else made from its tensors.

    Raises:
        ReplyError: the metadata is malformed, contradicts itself, or has a datatype that has no numpy form.
    """
    ours = ours_in(document)
    try:
        if "interface" in ours:
            interface = Interface.from_dict(ours["interface"])
            if ours.get("interface_digest", interface.digest) != interface.digest:
                raise ReplyError("the metadata's interface digest is not that of its interface")
            return interface
        return Interface(inputs=_specs(document, "inputs"), outputs=_specs(document, "outputs"))
    except (FormatError, ValueError, RecursionError) as error:
        raise ReplyError(f"the model's metadata is malformed: {error}") from None


def ours_in(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an Outrider endpoint says beyond the protocol, in metadata or in a reply; empty for another server."""
    parameters = document.get("parameters")
    ours = parameters.get("outrider") if isinstance(parameters, dict) else None
    return ours if isinstance(ours, dict) else {}


def _encode(document: Document, key: str, tensors: Iterable[tuple[str, Array, bool]]) -> Message:
    entries: list[Document] = []
    raw: list[memoryview] = []
    for name, array, binary in tensors:
        entry: Document = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
        if binary:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            raw.append(little.reshape(-1).view(np.uint8).data)
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise NotFiniteError(
                    f"tensor {name!r} has NaN or infinite values, which JSON cannot express",
                    tensor=name,
                    hint="ask for it in binary (binary_data_output)",
                )
            entry["data"] = array.reshape(-1).tolist()
        entries.append(entry)
    document[key] = entries
    head = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    if not raw:
        return Message(body=head, json_bytes=None)
    return Message(body=b"".join([head, *raw]), json_bytes=len(head))


def _wanted(document: Document, default: bool) -> dict[str, bool] | None:
    entries = document.get("outputs")
    if entries is None:
        return None
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TENSORS:
        raise InputError(f"'outputs' is not a list of 1 to {MAX_TENSORS} names")
    wanted: dict[str, bool] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name in wanted:
            raise InputError("an entry of 'outputs' has no name, or one that is listed twice")
        parameters = mapping(entry, "parameters", InputError)
        for key in ("classification", "shared_memory_region"):
            if key in parameters:
                raise InputError(f"output {name!r}: {key} is not served", tensor=name)
        wanted[name] = _flag(parameters, "binary_data", default=default)
    return wanted


def _check_output(spec: TensorSpec, array: Array, rows: int | None) -> None:
    where = f"output {spec.name!r} of the reply"
    if array.dtype.name != spec.dtype:
        raise ReplyError(f"{where} has dtype {array.dtype.name}, expected {spec.dtype}")
    wanted = (rows, *spec.shape[1:]) if spec.batched and rows is not None else spec.shape
    if len(array.shape) != len(wanted) or any(
        w is not None and s != w for s, w in zip(array.shape, wanted, strict=True)
    ):
        readable = ["any" if size is None else size for size in wanted]
        raise ReplyError(f"{where} has shape {list(array.shape)}, expected {readable}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ReplyError(f"{where} has NaN or infinite values")


def _described(spec: TensorSpec) -> Document:
    shape = [-1 if size is None else size for size in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def _specs(document: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    entries = document.get(key)
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TENSORS:
        raise FormatError(f"{key!r} is not a list of 1 to {MAX_TENSORS} tensors")
    specs = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise FormatError(f"an entry of {key!r} has no name")
        datatype, shape = entry.get("datatype"), entry.get("shape")
        if not isinstance(datatype, str) or datatype not in DTYPES:
            raise FormatError(f"tensor {entry['name'][:64]!r} has datatype {str(datatype)[:32]!r}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= -1 for size in shape):
            raise FormatError(f"tensor {entry['name'][:64]!r} has no shape")
        sizes = tuple(None if size == -1 else size for size in shape)
        specs.append(TensorSpec(name=entry["name"], dtype=DTYPES[datatype], shape=sizes))
    return tuple(specs)


def _string(document: Document, key: str, refuse: Refuse) -> str:
    value = document.get(key, "")
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise refuse(f"{key!r} is not a string of at most {MAX_NAME} characters")
    return value


def _flag(parameters: Document, key: str, *, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"parameter {key!r} is not true or false")
    return value


def _timeout(parameters: Document) -> int | None:
    """Microseconds; absent and 0 both mean that the caller set none."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise InputError("parameter 'timeout' is not a number of microseconds")
    return value or None
