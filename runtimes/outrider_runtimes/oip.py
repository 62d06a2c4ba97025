"""The Open Inference Protocol v2, bytes to tensors and back, for both sides.

A message is a JSON document; with the binary tensor extension the raw little-endian tensors follow it in the order in
which the document lists them, and the header ``Inference-Header-Content-Length`` says where the document ends.

Everything here is pure. Nothing is allocated by what a message declares: sizes are compared with the bytes that are
there first. Requests that break a rule raise InputError, replies ReplyError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring_ascii as quoted
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from outrider_runtimes._inputs import all_finite, fits
from outrider_runtimes._oip_files import BYTES, Files, files_in
from outrider_runtimes._oip_tensors import (
    DATATYPES,
    DEFAULT_LIMITS,
    DTYPES,
    JSON,
    LENGTH_HEADER,
    MAX_NAME,
    MAX_TENSORS,
    MAX_TIMEOUT_US,
    Bytes,
    Document,
    Limits,
    Rules,
    datatype_of,
    decode_json,
    flag,
    little_endian,
    mapping,
    numbers,
    open_body,
    read_tensors,
    text,
    timeout_us_of,
    wanted_outputs,
)
from outrider_runtimes.errors import FormatError, InputError, NotFiniteError, ReplyError
from outrider_runtimes.strictjson import orjson_if_installed
from outrider_runtimes.tensors import Array, Interface, Shape, Tensors, TensorSpec

__all__ = [
    "BINARY_EXTENSION",
    "BYTES",
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
    "compile_reply_check",
    "decode_json",
    "decode_reply",
    "decode_request",
    "encode_reply",
    "encode_request",
    "files_in",
    "interface_from_metadata",
    "model_metadata",
    "ours_in",
]

BINARY_EXTENSION = "binary_tensor_data"

_JSON_TYPE = (b"content-type", b"application/json")
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_LENGTH_FIELD = LENGTH_HEADER.lower().encode()
_JSON_HEAD = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_BINARY_HEAD = f"Content-Type: application/octet-stream\r\n{LENGTH_HEADER}: %d\r\nContent-Length: %d\r\n\r\n".encode()


class Message(NamedTuple):
    """A body to send.

    Attributes:
        parts: the JSON, and the memory of the tensors behind it, which must stay as it is until it is sent.
        json_bytes: the value of ``LENGTH_HEADER``; None where the body is JSON alone.
    """

    parts: tuple[bytes | memoryview, ...]
    json_bytes: int | None

    @property
    def body(self) -> bytes:
        """All of it in one piece."""
        return b"".join(self.parts)

    @property
    def headers(self) -> dict[str, str]:
        """Content type, and the length of the JSON part where tensors follow it."""
        if self.json_bytes is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(self.json_bytes)}

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        """The same as ASGI has them."""
        if self.json_bytes is None:
            return [_JSON_TYPE]
        return [_BINARY_TYPE, (_LENGTH_FIELD, b"%d" % self.json_bytes)]

    def head(self, size: int) -> bytes:
        """What HTTP's head ends with: ``headers``, and the body's ``size`` in bytes."""
        if self.json_bytes is None:
            return _JSON_HEAD % size
        return _BINARY_HEAD % (self.json_bytes, size)


class Request(NamedTuple):
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

    @property
    def size_bytes(self) -> int:
        """Of its tensors, in memory; a few bytes of files can be a lot of padding."""
        return sum(array.nbytes for array in self.inputs.values())


class Reply(NamedTuple):
    """A decoded inference reply; ``outputs`` are the receiver's own memory."""

    model: str
    version: str
    id: str
    outputs: dict[str, Array]
    parameters: Mapping[str, Any] = MappingProxyType({})


CheckReply = Callable[[Reply, str, "int | None"], "dict[str, Array]"]


def encode_request(
    inputs: Tensors,
    *,
    id: str = "",
    timeout_us: int | None = None,
    binary: bool = True,
    outputs: Iterable[str] | None = None,
) -> Message:
    """A request.

    Args:
        inputs: tensors by name, finite where ``binary`` is false.
        timeout_us: time left in microseconds.
        binary: whether tensors travel in binary, both ways.
        outputs: names of those that are asked for; None for all.

    Raises:
        NotFiniteError: a value that JSON cannot express.
    """
    opening = f'{{"id":{quoted(id)},' if id else "{"
    if timeout_us is not None:
        opening += f'"parameters":{{"timeout":{timeout_us:d}' + (',"binary_data_output":true},' if binary else "},")
    elif binary:
        opening += '"parameters":{"binary_data_output":true},'
    if outputs is not None:
        wanted = [{"name": name, "parameters": {"binary_data": binary}} for name in outputs]
        opening += f'"outputs":{JSON.encode(wanted)},'
    return _encode(opening + '"inputs":', [(name, array, binary) for name, array in inputs.items()])


def decode_request(
    body: Bytes, json_bytes: int | None, *, limits: Limits = DEFAULT_LIMITS, files: Files = MappingProxyType({})
) -> Request:
    """The inverse of ``encode_request``.

    Args:
        body: the whole body.
        json_bytes: the value of ``LENGTH_HEADER``; None when the header was not sent.
        files: the inputs that may come as BYTES too, a file a row; see ``files_in``. They become uint8 [N, T].

    Raises:
        InputError: bytes that the protocol or ``limits`` do not allow, or a datatype that is not served.
    """
    rules = Rules(refuse=InputError, limits=limits, files=files)
    document, start = open_body(body, json_bytes, rules)
    parameters = mapping(document, "parameters", InputError)
    return Request(
        id=text(document, "id", InputError),
        inputs=read_tensors(document, "inputs", body, start, rules),
        outputs=wanted_outputs(document, flag(parameters, "binary_data_output")),
        binary=flag(parameters, "binary_data_output"),
        timeout_us=timeout_us_of(parameters),
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
    quick = orjson_if_installed()
    text = JSON.encode(document) if quick is None else quick.dumps(document).decode()
    opening = text[:-1] + ',"outputs":'
    return _encode(opening, [(name, outputs[name], binary) for name, binary in wanted.items()])


def decode_reply(body: Bytes, json_bytes: int | None, *, limits: Limits = DEFAULT_LIMITS) -> Reply:
    """The inverse of ``encode_reply``. Raises ReplyError."""
    rules = Rules(refuse=ReplyError, limits=limits)
    document, start = open_body(body, json_bytes, rules)
    return Reply(
        text(document, "model_name", ReplyError),
        text(document, "model_version", ReplyError),
        text(document, "id", ReplyError),
        read_tensors(document, "outputs", body, start, rules),
        mapping(document, "parameters", ReplyError),
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
    names = [spec.name for spec in interface.outputs]
    if reply.outputs.keys() != set(names):
        raise ReplyError(f"the reply has the outputs {sorted(reply.outputs)[:16]}, expected {names}")
    for spec in interface.outputs:
        _check_output(spec, reply.outputs[spec.name], rows)
    return {name: reply.outputs[name] for name in names}


def compile_reply_check(interface: Interface) -> CheckReply:
    """``check_reply`` of one interface, with everything looked up once.

    Outputs of the shapes that were there before are taken at once; any others go to ``check_reply``.
    """
    names = [spec.name for spec in interface.outputs]
    plain = [_compile_output(spec) for spec in interface.outputs]

    def check(reply: Reply, id: str, rows: int | None) -> dict[str, Array]:
        outputs = reply.outputs
        if reply.id == id and list(outputs) == names:
            for name, is_plain in zip(names, plain):  # noqa: B905 - as many as there are names
                if not is_plain(outputs[name], rows):
                    break
            else:
                return outputs
        return check_reply(interface, reply, id=id, rows=rows)

    return check


def model_metadata(
    name: str, interface: Interface, *, versions: Iterable[int], platform: str, parameters: Mapping[str, Any]
) -> Document:
    """What ``GET /v2/models/<name>`` answers; None in a shape becomes -1, and an input that is a file BYTES [N]."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": platform,
        "inputs": [_described_file(spec) if spec.content_type else _described(spec) for spec in interface.inputs],
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


def _encode(opening: str, tensors: Iterable[tuple[str, Array, bool]]) -> Message:
    """``opening`` is the document up to where the tensors are listed."""
    entries: list[str] = []
    raw: list[bytes | memoryview] = []
    for name, array, binary in tensors:
        sizes = ",".join(map(str, array.shape))
        entry = f'{{"name":{quoted(name)},"shape":[{sizes}],"datatype":"{datatype_of(array)}",'
        if binary:
            raw.append(little_endian(array))
            entries.append(f'{entry}"parameters":{{"binary_data_size":{array.nbytes}}}}}')
        else:
            if array.dtype.kind == "f" and not _is_finite(array):
                raise NotFiniteError(
                    f"tensor {name!r} has NaN or infinite values, which JSON cannot express",
                    tensor=name,
                    hint="ask for it in binary (binary_data_output)",
                )
            entries.append(f'{entry}"data":[{numbers(array)}]}}')
    head = f"{opening}[{','.join(entries)}]}}".encode()
    if not raw:
        return Message((head,), None)
    return Message((head, *raw), len(head))


def _is_finite(array: Array) -> bool:
    """Whatever its memory is like."""
    plain = array.flags.c_contiguous and array.dtype.isnative
    return all_finite(array) if plain else bool(np.isfinite(array).all())


def _check_output(spec: TensorSpec, array: Array, rows: int | None) -> None:
    where = f"output {spec.name!r} of the reply"
    if array.dtype != spec.dtype:
        raise ReplyError(f"{where} has dtype {array.dtype.name}, expected {spec.dtype}")
    wanted = _wanted(spec, rows)
    if array.shape != wanted and not fits(array.shape, wanted):
        readable = ["any" if size is None else size for size in wanted]
        raise ReplyError(f"{where} has shape {list(array.shape)}, expected {readable}")
    if array.dtype.kind == "f" and not all_finite(array):
        raise ReplyError(f"{where} has NaN or infinite values")


def _compile_output(spec: TensorSpec) -> Callable[[Array, int | None], bool]:
    """Whether an output is one that ``_check_output`` lets pass; where in doubt, False."""
    dtype, finite = np.dtype(spec.dtype), np.dtype(spec.dtype).kind != "f"
    known: tuple[tuple[int, ...], int | None] | None = None  # the last shape that fitted, and the rows it was for

    def is_plain(array: Array, rows: int | None) -> bool:
        nonlocal known
        if array.dtype is not dtype:
            return False
        if (array.shape, rows) != known:
            if not fits(array.shape, _wanted(spec, rows)):
                return False
            known = array.shape, rows
        return finite or all_finite(array)

    return is_plain


def _wanted(spec: TensorSpec, rows: int | None) -> Shape:
    return (rows, *spec.shape[1:]) if spec.batched and rows is not None else spec.shape


def _described(spec: TensorSpec) -> Document:
    shape = [-1 if size is None else size for size in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def _described_file(spec: TensorSpec) -> Document:
    return {**_described(spec), "datatype": BYTES, "shape": [-1 if spec.shape[0] is None else spec.shape[0]]}


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
