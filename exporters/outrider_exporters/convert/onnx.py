"""PyTorch to ONNX, by the exporter that comes with torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from outrider_exporters.convert.onnx_graphs import strip_metadata
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import Sizes, example_rows, free_axes, free_letters
from outrider_exporters.sources.module import PositionalModule, as_tensors, torch_predict
from outrider_runtimes.errors import ExportError, OutriderError
from outrider_runtimes.tensors import BATCH_AXIS, Interface, Tensors, TensorSpec

OPSET = 20  # ONNX Runtime 1.17 and later; the newest that torch's exporter lowers to without a version conversion
SCRIPTED_OPSET = 17  # the newest that the older exporter is known to be right in
DYNAMIC_TRACE_ROWS = 2  # torch.export takes a size of 1 for a constant
Arguments = tuple[torch.Tensor, ...]
Write = Callable[[PositionalModule, Arguments, Interface, bool], Any]


def to_onnx(
    module: nn.Module, interface: Interface, example: Tensors, path: Path, *, sizes: Sequence[Sizes] = ()
) -> ModelFile:
    """Write a network as one float32 ONNX file, checked against the network.

    N stays free in the file where the network allows it; else the file has N = 1 and its binding says so. Other axes
    that the interface leaves free are free in the file.

    Args:
        module: left as it is; the file has its evaluation mode.
        example: at least one row.
        path: written in one step, once the file was loaded and its answers compared.
        sizes: of the free axes, at which the answers are compared too.

    Raises:
        ExportError: the network cannot be converted, or the file answers differently. Nothing was written.
    """
    runner = PositionalModule(module, [s.name for s in interface.inputs], [s.name for s in interface.outputs])
    batched = any(spec.batched for spec in interface.inputs)
    failures: list[Exception] = []
    for write in _writers(module, interface):
        for free in (True, False) if batched else (False,):
            try:
                file = _convert(runner, write, interface, example, path, free=free, sizes=tuple(sizes))
                return replace(file, path=path)
            except Exception as error:
                failures.append(error)
    last = failures[-1]
    if isinstance(last, OutriderError):
        raise last
    raise conversion_error(last, module, "onnx") from last


def _writers(module: nn.Module, interface: Interface) -> tuple[Write, ...]:
    """The exporters to try, in order: the older one keeps ``nn.RNN`` as one operator, where the newer unrolls it, and
    any recurrent layer's length free."""
    free = bool(free_letters(interface.inputs))
    kept = nn.RNNBase if free else nn.RNN
    if any(isinstance(layer, kept) for layer in module.modules()):
        return (_scripted, _exported)
    return (_exported, _scripted) if free else (_exported,)


def _convert(
    runner: PositionalModule,
    write: Write,
    interface: Interface,
    example: Tensors,
    path: Path,
    *,
    free: bool,
    sizes: tuple[Sizes, ...],
) -> ModelFile:
    rows = DYNAMIC_TRACE_ROWS if free else 1
    arguments = as_tensors(list(example_rows(example, interface, rows).values()))
    with kept_when_good(path) as part:
        with quiet():
            _save(write(runner, arguments, interface, free), part)
        binding = bind(interface, open_session(part, "onnx"), channel_last=False)
        file = ModelFile(path=part, format="onnx", precision="float32", binding=binding, scheme="float32", sizes=sizes)
        check_file(file, interface, example, torch_predict(runner.module, interface))
    return file


def _exported(runner: PositionalModule, arguments: Arguments, interface: Interface, free: bool) -> Any:
    places = [_free_places(spec, free) for spec in interface.inputs]
    dims = {letter: torch.export.Dim(letter) for found in places for letter in found.values()}
    shapes = tuple({at: dims[letter] for at, letter in found.items()} or None for found in places)
    program = torch.onnx.export(
        runner,
        arguments,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(shapes,) if dims else None,  # of forward(*tensors)
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export gave nothing")
    return program.model_proto


def _scripted(runner: PositionalModule, arguments: Arguments, interface: Interface, free: bool) -> Any:
    """By torch's older exporter, which looks at the run of one example and knows layers as a whole."""
    import onnx

    names_in = {f"in_{spec.name}": spec for spec in interface.inputs}
    names_out = {f"out_{spec.name}": spec for spec in interface.outputs}
    buffer: Any = io.BytesIO()
    torch.onnx.export(
        runner,
        arguments,
        buffer,
        dynamo=False,
        opset_version=SCRIPTED_OPSET,
        input_names=list(names_in),
        output_names=list(names_out),
        dynamic_axes={name: _free_places(spec, free) for name, spec in {**names_in, **names_out}.items()},
    )
    return onnx.load_from_string(buffer.getvalue())


def _free_places(spec: TensorSpec, rows_free: bool) -> dict[int, str]:
    """The axes that a file leaves free, with their letters."""
    return {**({0: BATCH_AXIS} if rows_free and spec.batched else {}), **free_axes(spec)}


def _save(model: Any, path: Path) -> None:
    """Without metadata: it holds the source paths of the machine that trained the network."""
    strip_metadata(model)
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise ExportError(f"the ONNX file would exceed 2 GB: {first_line(error)}") from error
