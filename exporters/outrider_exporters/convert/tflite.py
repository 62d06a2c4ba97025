"""PyTorch to TFLite, by litert-torch."""

from __future__ import annotations

from collections.abc import Sequence
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
    is_channel_first,
    kept_when_good,
    open_session,
    signature_shapes,
)
from outrider_exporters.convert.fuse import fuse_transposed
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import Sizes, example_rows, free_letters, resize_axes
from outrider_exporters.sources.module import PositionalModule, as_tensors, torch_predict
from outrider_runtimes.errors import ExportError, MissingExtra, ModelLoadError, OutriderError
from outrider_runtimes.tensors import Interface, Tensors


def to_tflite(
    module: nn.Module, interface: Interface, example: Tensors, path: Path, *, sizes: Sequence[Sizes] = ()
) -> ModelFile:
    """Write a network as one float32 TFLite file with N = 1, checked against the network.

    NCHW tensors become NHWC, 64-bit tensors 32-bit; the binding says so.

    Args:
        module: left as it is; the file has its evaluation mode.
        example: at least one row.
        path: written in one step, once the file was loaded and its answers compared.
        sizes: of the axes that the interface leaves free: the file gets a signature for each, which share the weights.

    Raises:
        ExportError: the network cannot be converted, or the file answers differently. Nothing was written.
        MissingExtra: litert-torch is not installed.
    """
    if not sizes and free_letters(interface.inputs):
        raise ExportError(
            f"TFLite has fixed sizes, and {', '.join(free_letters(interface.inputs))} is free",
            hint='shapes={"T": [8, 16]} makes a signature for each size of T',
        )
    runner = PositionalModule(module, [s.name for s in interface.inputs], [s.name for s in interface.outputs])
    row = example_rows(example, interface, 1)
    shapes = signature_shapes(interface, sizes)
    try:
        with kept_when_good(path) as part:
            _export(runner, interface, [resize_axes(row, interface.inputs, given) for given in sizes or ({},)], part)
            file = ModelFile(
                path=part,
                format="tflite",
                precision="float32",
                binding=bind(interface, open_session(part, "tflite"), channel_last=True, signatures=shapes),
                scheme="float32",
                sizes=tuple(sizes),
            )
            check_file(file, interface, example, torch_predict(module, interface))
    except ModelLoadError as error:
        raise conversion_error(error, module, "tflite") from error
    except OutriderError:
        raise
    except Exception as error:
        raise conversion_error(error, module, "tflite") from error
    return replace(file, path=path)


def _export(runner: PositionalModule, interface: Interface, rows: Sequence[Tensors], path: Path) -> None:
    """Args: rows: one row of inputs for each signature."""
    turned_in = [at for at, spec in enumerate(interface.inputs) if is_channel_first(spec)]
    turned_out = [at for at, spec in enumerate(interface.outputs) if is_channel_first(spec)]
    with quiet():
        try:
            import litert_torch
        except ImportError as error:
            raise MissingExtra("litert-torch", extra="export", purpose="converting to TFLite") from error
        network = fuse_transposed(runner, as_tensors(list(rows[0].values())))
        if turned_in or turned_out:
            network = litert_torch.to_channel_last_io(network, args=turned_in, outputs=turned_out).eval()
        with torch.no_grad():
            if len(rows) == 1:
                model = litert_torch.convert(network, _arguments(rows[0], turned_in))
            else:
                converter: Any = litert_torch
                for at, row in enumerate(rows):
                    converter = converter.signature(f"shape_{at}", network, _arguments(row, turned_in))
                model = converter.convert()
            # Its own export(path) ends the whole process when the disk is full.
            path.write_bytes(model.model_content())


def _arguments(row: Tensors, turned: Sequence[int]) -> tuple[torch.Tensor, ...]:
    arguments = as_tensors(list(row.values()))
    return tuple(a.permute(0, 2, 3, 1).contiguous() if at in turned else a for at, a in enumerate(arguments))
