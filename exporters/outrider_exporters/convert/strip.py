"""Model files without what only people read: names of inner tensors, notes, metadata. What they compute stays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.convert.files import ModelFile, first_line, inputs_to_check, predict_file
from outrider_exporters.convert.onnx_graphs import graphs_of, strip_metadata
from outrider_exporters.convert.onnx_lean import make_lean
from outrider_exporters.convert.quiet import quiet
from outrider_runtimes.errors import MissingExtra, OutriderError
from outrider_runtimes.tensors import Interface, Tensors

_log = logging.getLogger(__name__)
ALIGNMENT = 16  # of stored tensors, as the schema asks for; flatbuffers for Python leaves it to the caller
# By this entry a file allows delegates to compute in 16 bits: without it answers may change.
KEPT_METADATA = (b"reduced_precision_support",)
OUTSIDE = 1  # a greater offset of a buffer says that its data stand behind the flatbuffer
MOST_BYTES = 2**31 - 1  # of a flatbuffer: its offsets are signed 32-bit integers


def stripped(file: ModelFile, interface: Interface, example: Tensors, path: Path) -> ModelFile:
    """The same model in fewer bytes, written to ``path``; or the file itself where that gains nothing.

    The names by which callers know the file's inputs and outputs stay, and so does its binding. It was loaded and run,
    on one and on several rows, and answered bit for bit as the file did.

    Args:
        file: left as it is: whoever looks at inner tensors needs their names.
        example: at least one row.
    """
    try:
        with quiet():
            content = _STRIPPERS[file.format](file.path.read_bytes())
        if len(content) >= file.path.stat().st_size:
            return file
        path.write_bytes(content)
        smaller = replace(file, path=path)
        if _alike(file, smaller, interface, example):
            return smaller
        reason = "it answers differently"
    except OutriderError as error:
        reason = str(error)
    except Exception as error:
        reason = first_line(error)
    path.unlink(missing_ok=True)
    _log.warning("%s keeps its names and notes: without them %s", file.path.name, reason)
    return file


def strip_tflite(content: bytes) -> bytes:
    """A TFLite file without names of inner tensors, description, metadata and calibration ranges, and with every
    vector that occurs several times stored once. Weights that stand behind the flatbuffer come into it.

    Raises:
        ValueError: they stand in another file, or are too much for a flatbuffer.
    """
    import flatbuffers  # type: ignore[import-untyped]

    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise MissingExtra("ai-edge-litert", extra="export", purpose="writing TFLite") from error

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    if model.externalBuffers or len(content) > MOST_BYTES:
        raise ValueError("its weights stand outside of it, or are too much for a flatbuffer")
    for buffer in model.buffers:
        if buffer.offset > OUTSIDE:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    model.description = model.metadataBuffer = None
    model.metadata = [item for item in model.metadata or () if item.name in KEPT_METADATA] or None
    known = len(model.signatureDefs or ()) == 1 and len(model.subgraphs) == 1  # by its signature's names
    for graph in model.subgraphs:
        graph.name, graph.debugMetadataIndex = None, -1
        for operator in graph.operators or ():
            operator.debugMetadataIndex = -1
        named = set() if known else {*graph.inputs, *graph.outputs}
        for at, tensor in enumerate(graph.tensors):
            if at not in named:
                tensor.name = None
            _strip_quantization(tensor)
    _compact_buffers(model, schema.BufferT)

    class Sharing(flatbuffers.Builder):  # type: ignore[misc]
        """Writes a vector once, however often it occurs, aligned as the schema asks for."""

        def CreateNumpyVector(self, x: Any) -> int:  # noqa: N802  its parent's name
            key = (x.dtype.str, x.tobytes())
            if key not in shared:
                shared[key] = int(super().CreateNumpyVector(x))
            return shared[key]

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802  its parent's
            return super().StartVector(elemSize, numElems, ALIGNMENT if elemSize == 1 else alignment)

    shared: dict[tuple[str, bytes], int] = {}
    builder = Sharing(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _strip_quantization(tensor: Any) -> None:
    """Without the ranges that a scale was once made from; without the whole entry where it has no scale."""
    found = tensor.quantization
    if found is None:
        return
    found.min = found.max = None
    if not found.detailsType and (found.scale is None or not len(found.scale)):
        tensor.quantization = None


def _compact_buffers(model: Any, buffer_type: Callable[[], Any]) -> None:
    """One empty buffer, which comes first, and one a different content."""
    kept = [buffer_type()]
    places: dict[bytes, int] = {}

    def place(at: int) -> int:
        data = model.buffers[at].data
        if data is None or not len(data):
            return 0
        content = np.asarray(data).tobytes()
        if content not in places:
            places[content] = len(kept)
            kept.append(model.buffers[at])
        return places[content]

    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = place(tensor.buffer)
    for item in model.metadata or ():
        item.buffer = place(item.buffer)
    model.buffers = kept


def strip_onnx(content: bytes) -> bytes:
    """An ONNX file without notes, names of nodes, shapes of inner tensors, unused operator sets and what ``onnx_lean``
    finds needless, its inner tensors named by short numbers."""
    import onnx

    model = onnx.load_from_string(content)
    strip_metadata(model)
    make_lean(model)
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output)}
    short = _shorter(known)
    names = {name: name for name in ("", *known)}
    for inner in graphs_of(graph):
        inner.ClearField("value_info")
        inner.ClearField("quantization_annotation")
        values = [*inner.initializer, *(item.values for item in inner.sparse_initializer)]
        for value in (*values, *(() if inner is graph else (*inner.input, *inner.output))):
            value.name = _renamed(value.name, names, short)
        for node in inner.node:
            node.ClearField("name")
            node.input[:] = [_renamed(name, names, short) for name in node.input]
            node.output[:] = [_renamed(name, names, short) for name in node.output]
    used = {node.domain for inner in graphs_of(graph) for node in inner.node}
    used.update(node.domain for function in model.functions for node in function.node)
    opsets = [item for item in model.opset_import if item.domain in {"", *used}]
    model.ClearField("opset_import")
    model.opset_import.extend(opsets)
    return bytes(model.SerializeToString())


def _renamed(name: str, names: dict[str, str], short: Iterator[str]) -> str:
    """One old name has one new name in all graphs, as an inner graph may read what an outer one computed."""
    if name not in names:
        names[name] = next(short)
    return names[name]


def _shorter(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = f"{number:x}"
        number += 1
        if name not in taken:
            yield name


def _alike(file: ModelFile, other: ModelFile, interface: Interface, example: Tensors) -> bool:
    """Whether both answer with the same bits."""
    first, second = predict_file(file, interface), predict_file(other, interface)
    for inputs, _ in inputs_to_check(file, interface, example):
        wanted, got = first(inputs), second(inputs)
        if any(wanted[name].tobytes() != got[name].tobytes() for name in wanted):
            return False
    return True


_STRIPPERS: dict[str, Callable[[bytes], bytes]] = {"onnx": strip_onnx, "tflite": strip_tflite}
