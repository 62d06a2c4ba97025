"""Weights from a file into a network that the user's code builds. Nothing that is in the file is ever run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_exporters.recipe.model import call_reference
from outrider_runtimes.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    import torch
    from torch import nn

SAFETENSORS = ".safetensors"
# What training loops call the weights in a file that holds more than them.
WRAPPERS = ("state_dict", "model_state_dict", "model")
SHOWN_KEYS = 3


def load_checkpoint(path: str | Path, *, build: str | Callable[[], nn.Module]) -> nn.Module:
    """A network with the weights of a checkpoint.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save(model.state_dict(), path)``; the weights may stand in
            it under ``state_dict``, ``model_state_dict`` or ``model``.
        build: a function without arguments that gives the network, or its name as ``module:function``.

    Raises:
        ExportError: a pickled model or anything else but tensors, or weights of another network; nothing in the file
            was run.
        ConfigError: ``build`` cannot be found, raised, or gave no network.
        MissingExtra: torch or safetensors is not installed.
    """
    from torch import nn

    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file {file}", hint="check the path of the checkpoint")
    weights = _read_safetensors(file) if file.suffix.lower() == SAFETENSORS else _read_state_dict(file)
    network = call_reference(build, "build") if isinstance(build, str) else build()
    if not isinstance(network, nn.Module):
        raise ExportError(f"build gave a {type(network).__name__}, expected a torch.nn.Module")
    _fill(network, weights, file)
    return network.eval()


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise MissingExtra("safetensors", extra="export", purpose="reading a .safetensors checkpoint") from error
    try:
        return load_file(file, device="cpu")
    except Exception as error:
        raise ExportError(
            f"{file.name} is no safetensors file: {_first_line(error)}",
            hint="it may be cut short, or another format under this name; safetensors.torch.save_file writes one",
        ) from error


def _read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive it first says that it would run it, then refuses
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(
            f"{file.name} is refused: it is a pickled model or no checkpoint, and opening a pickle runs whatever "
            f"code is in it ({_first_line(error)})",
            hint="where you trust it, load it yourself and save its weights: torch.save(model.state_dict(), path)",
        ) from error
    return _tensors(loaded, file)


def _tensors(loaded: Any, file: Path) -> dict[str, torch.Tensor]:
    """The tensors by name of what was loaded."""
    import torch

    if isinstance(loaded, Mapping):
        for wrapper in WRAPPERS:
            if isinstance(loaded.get(wrapper), Mapping):
                return _tensors(loaded[wrapper], file)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ExportError(f"{file.name} holds a {type(loaded).__name__}, expected weights by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ExportError(
                f"{file.name} holds a {type(value).__name__} under {name!r}, expected a tensor",
                hint=f"save the weights alone, or under {WRAPPERS[0]!r}",
            )
    return dict(loaded)


def _fill(network: nn.Module, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Every weight of the network from the file, and every weight of the file into the network."""
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights]
    stray = [name for name in weights if name not in wanted]
    if missing or stray:
        said = [f"lacks {_names(missing)}"] * bool(missing) + [f"has {_names(stray)} too many"] * bool(stray)
        raise ExportError(
            f"{file.name} is not a checkpoint of this {type(network).__name__}: it {' and '.join(said)}",
            hint="build must give the network that was trained; wrappers such as DataParallel prefix its names",
        )
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            raise ExportError(
                f"{file.name}: {name!r} is {list(weights[name].shape)}, the network's is {list(tensor.shape)}",
                hint="build must give the network that was trained, with the same sizes",
            )
    network.load_state_dict(dict(weights))


def _names(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(map(repr, names[:SHOWN_KEYS])) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
