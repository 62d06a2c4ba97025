"""What of a network the converters would accept without a word, refused here by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from outrider_exporters.sources.keras_model import is_keras, refuse_backend
from outrider_runtimes.errors import ExportError
from outrider_runtimes.tensors import Array

# A share of the output's range. Another batch size sums in another order, which is far below it.
SAME_ANSWER = 1e-3


def check_kind(module: object) -> None:
    """Raise ExportError for what is no network."""
    if isinstance(module, nn.Module):
        return
    if is_keras(module):
        refuse_backend(module)
    hint = "a torch module, a Keras 3 model on the torch backend, or the path of an .onnx or .tflite file"
    if isinstance(module, Mapping):
        hint = "these are weights without a network: load_checkpoint(path, build=function) puts them into one"
    raise ExportError(f"the model is a {type(module).__name__}, not a torch.nn.Module", hint=hint)


def check_weights(module: nn.Module) -> None:
    """Raise ExportError for weights that are not finite, not float32, or quantized, naming the first."""
    _check_layers(module)
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ExportError(f"{kind} {name!r} has no shape yet", hint="run the network once before the export")
            _check_plain(name, tensor)
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ExportError(f"{kind} {name!r} is {tensor.dtype}, expected torch.float32", hint="model.float()")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                if kind == "buffer" and not bool(torch.isnan(tensor).any()):
                    continue  # attention masks are buffers of minus infinity
                raise ExportError(
                    f"{kind} {name!r} has NaN or infinite values",
                    hint="the training diverged: go back to a checkpoint from before it",
                )


def check_answers(names: Sequence[str], small: Sequence[Array], again: Sequence[Array], large: Sequence[Array]) -> None:
    """Refuse random answers, and rows that depend on each other: a server puts strangers' rows into one batch.

    Args:
        small, again: outputs of two runs on the same rows.
        large: of a run on these rows and more.

    Raises:
        ExportError: naming the output.
    """
    for name, first, second, longer in zip(names, small, again, large, strict=True):
        if not _same(first, second):
            raise ExportError(
                f"output {name!r} differs from run to run on the same inputs: forward uses random numbers",
                hint="functional.dropout wants training=self.training; noise that is meant must be an input",
            )
        follows_n = longer.ndim and longer.shape[1:] == first.shape[1:] and len(longer) > len(first)
        if follows_n and not _same(first, longer[: len(first)]):
            raise ExportError(
                f"output {name!r} of a row depends on the rows beside it",
                hint="conditions, means and norms must act on each row alone, not over axis 0",
            )


def _same(first: Array, second: Array) -> bool:
    if first.shape != second.shape or first.dtype.kind != "f" or not first.size:
        return True
    wide = np.nan_to_num(first.astype(np.float64)), np.nan_to_num(second.astype(np.float64))
    reach = float(np.ptp(wide[0])) or float(np.abs(wide[0]).max()) or 1.0
    return float(np.abs(wide[0] - wide[1]).max()) <= SAME_ANSWER * reach


def _check_layers(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        kind = type(layer)
        if kind.__module__.startswith("torch.ao.nn") and ".quantized" in kind.__module__:
            raise ExportError(
                f"layer {name!r} ({kind.__module__}.{kind.__name__}) is quantized already",
                hint="start from the float network; Quantize in the recipe quantizes it for the boards' engines",
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise ExportError(
                f"layer {name!r} ({kind.__name__}) has no running statistics: a row's answer depends on its batch",
                hint="train it with track_running_stats=True, or use GroupNorm or LayerNorm",
            )


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    home = type(tensor.data).__module__
    if home.startswith("torchao"):
        raise ExportError(
            f"parameter {name!r} is a {home}.{type(tensor.data).__name__}: it is quantized already",
            hint="start from the float network; Quantize in the recipe quantizes it for the boards' engines",
        )
