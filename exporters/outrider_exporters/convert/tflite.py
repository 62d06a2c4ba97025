"""PyTorch to TFLite, by litert-torch."""

from __future__ import annotations

from pathlib import Path

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
)
from outrider_exporters.convert.fuse import fuse_transposed
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import example_rows
from outrider_exporters.sources.module import PositionalModule, as_tensors, torch_predict
from outrider_runtimes.errors import MissingExtra, ModelLoadError, OutriderError
from outrider_runtimes.tensors import Array, Interface, Tensors


def to_tflite(module: nn.Module, interface: Interface, example: Tensors, path: Path) -> ModelFile:
    """Write a network as one float32 TFLite file with N = 1, checked against the network.

    NCHW tensors become NHWC, 64-bit tensors 32-bit; the binding says so.

    Args:
        module: left as it is; the file has its evaluation mode.
        example: at least one row.
        path: written in one step, once the file was loaded and its answers compared.

    Raises:
        ExportError: the network cannot be converted, or the file answers differently. Nothing was written.
        MissingExtra: litert-torch is not installed.
    """
    runner = PositionalModule(module, [s.name for s in interface.inputs], [s.name for s in interface.outputs])
    row = list(example_rows(example, interface, 1).values())
    try:
        with kept_when_good(path) as part:
            _export(runner, interface, row, part)
            binding = bind(interface, open_session(part, "tflite"), channel_last=True)
            file = ModelFile(path=part, format="tflite", precision="float32", binding=binding, scheme="float32")
            check_file(file, interface, example, torch_predict(module, interface))
    except ModelLoadError as error:
        raise conversion_error(error, module, "tflite") from error
    except OutriderError:
        raise
    except Exception as error:
        raise conversion_error(error, module, "tflite") from error
    return ModelFile(path=path, format="tflite", precision="float32", binding=binding, scheme="float32")


def _export(runner: PositionalModule, interface: Interface, row: list[Array], path: Path) -> None:
    turned_in = [at for at, spec in enumerate(interface.inputs) if is_channel_first(spec)]
    turned_out = [at for at, spec in enumerate(interface.outputs) if is_channel_first(spec)]
    with quiet():
        try:
            import litert_torch
        except ImportError as error:
            raise MissingExtra("litert-torch", extra="export", purpose="converting to TFLite") from error
        arguments = list(as_tensors(row))
        for at in turned_in:
            arguments[at] = arguments[at].permute(0, 2, 3, 1).contiguous()
        network = fuse_transposed(runner, as_tensors(row))
        if turned_in or turned_out:
            network = litert_torch.to_channel_last_io(network, args=turned_in, outputs=turned_out).eval()
        with torch.no_grad():
            model = litert_torch.convert(network, tuple(arguments))
            # Its own export(path) ends the whole process when the disk is full.
            path.write_bytes(model.model_content())
