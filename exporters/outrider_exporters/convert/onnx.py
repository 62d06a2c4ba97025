"""PyTorch to ONNX, by the exporter that comes with torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider_exporters.convert.diagnose import conversion_error
from outrider_exporters.convert.files import (
    ModelFile,
    bind,
    check_file,
    first_line,
    kept_when_good,
    open_session,
)
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import example_rows
from outrider_exporters.sources.module import PositionalModule, as_tensors, torch_predict
from outrider_runtimes.errors import ExportError, OutriderError
from outrider_runtimes.tensors import BATCH_AXIS, Interface, Tensors

OPSET = 20  # ONNX Runtime 1.17 and later; the newest that torch's exporter lowers to without a version conversion
SCRIPTED_OPSET = 17  # the newest that the older exporter is known to be right in
DYNAMIC_TRACE_ROWS = 2  # torch.export takes a size of 1 for a constant
Arguments = tuple[torch.Tensor, ...]
Write = Callable[[PositionalModule, Arguments, Interface, bool], Any]


def to_onnx(module: nn.Module, interface: Interface, example: Tensors, path: Path) -> ModelFile:
    """Write a network as one float32 ONNX file, checked against the network.

    N stays free in the file where the network allows it; else the file has N = 1 and its binding says so.

    Args:
        module: left as it is; the file has its evaluation mode.
        example: at least one row.
        path: written in one step, once the file was loaded and its answers compared.

    Raises:
        ExportError: the network cannot be converted, or the file answers differently. Nothing was written.
    """
    runner = PositionalModule(module, [s.name for s in interface.inputs], [s.name for s in interface.outputs])
    batched = any(spec.batched for spec in interface.inputs)
    failures: list[Exception] = []
    for write in _writers(module):
        for free in (True, False) if batched else (False,):
            try:
                return _convert(runner, write, interface, example, path, free=free)
            except Exception as error:
                failures.append(error)
    last = failures[-1]
    if isinstance(last, OutriderError):
        raise last
    raise conversion_error(last, module, "onnx") from last


def _writers(module: nn.Module) -> tuple[Write, ...]:
    """The exporters to try, in order: the one that keeps ``nn.RNN`` as one operator, and the one that unrolls it."""
    return (_scripted, _exported) if any(isinstance(layer, nn.RNN) for layer in module.modules()) else (_exported,)


def _convert(
    runner: PositionalModule, write: Write, interface: Interface, example: Tensors, path: Path, *, free: bool
) -> ModelFile:
    rows = DYNAMIC_TRACE_ROWS if free else 1
    arguments = as_tensors(list(example_rows(example, interface, rows).values()))
    with kept_when_good(path) as part:
        with quiet():
            _save(write(runner, arguments, interface, free), part)
        binding = bind(interface, open_session(part, "onnx"), channel_last=False)
        file = ModelFile(path=part, format="onnx", precision="float32", binding=binding, scheme="float32")
        check_file(file, interface, example, torch_predict(runner.module, interface))
    return ModelFile(path=path, format="onnx", precision="float32", binding=binding, scheme="float32")


def _exported(runner: PositionalModule, arguments: Arguments, interface: Interface, free: bool) -> Any:
    program = torch.onnx.export(
        runner,
        arguments,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=_free_axes(interface) if free else None,
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export gave nothing")
    return program.model_proto


def _scripted(runner: PositionalModule, arguments: Arguments, interface: Interface, free: bool) -> Any:
    """By torch's older exporter, which looks at the run of one example and knows layers as a whole."""
    import onnx

    tensors = (*interface.inputs, *interface.outputs)
    buffer: Any = io.BytesIO()
    torch.onnx.export(
        runner,
        arguments,
        buffer,
        dynamo=False,
        opset_version=SCRIPTED_OPSET,
        input_names=[f"in_{spec.name}" for spec in interface.inputs],
        output_names=[f"out_{spec.name}" for spec in interface.outputs],
        dynamic_axes={
            f"{'in' if at < len(interface.inputs) else 'out'}_{spec.name}": {0: BATCH_AXIS}
            for at, spec in enumerate(tensors)
            if free and spec.batched
        },
    )
    return onnx.load_from_string(buffer.getvalue())


def _free_axes(interface: Interface) -> tuple[tuple[dict[int, Any] | None, ...]]:
    """For ``forward(*tensors)``: one dictionary an input, axis 0 being the same N in all of them."""
    rows = torch.export.Dim(BATCH_AXIS)
    return (tuple({0: rows} if spec.batched else None for spec in interface.inputs),)


def _save(model: Any, path: Path) -> None:
    """Without metadata: it holds the source paths of the machine that trained the network."""
    strip_metadata(model)
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise ExportError(f"the ONNX file would exceed 2 GB: {first_line(error)}") from error


def strip_metadata(model: Any) -> None:
    """Remove notes that the exporter left on a ModelProto, its graphs, nodes and tensors, in place."""
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    for function in model.functions:
        function.ClearField("metadata_props")
        _strip_nodes(function)
    _strip_graph(model.graph)


def _strip_graph(graph: Any) -> None:
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    _strip_nodes(graph)


def _strip_nodes(holder: Any) -> None:
    for node in holder.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                _strip_graph(inner)
