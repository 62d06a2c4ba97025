"""What ``[model]`` of a recipe file names, as arguments of ``export``: the user's own code, found and called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from outrider_exporters.recipe import RecipeFile

ALWAYS = ("data", "evaluate")
DESCRIBED = ("example", "outputs")  # what a network does not say of itself, and a file does
OPTIONAL = ("fit", "teacher", "axes", "ranges", "meanings", "golden", "preprocessing", "postprocessing", "is_wrong")
TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "litert_torch",
    "ai_edge_litert",
    "ai_edge_quantizer",
    "torch_pruning",
    "keras",
)


def arguments_from(file: RecipeFile) -> dict[str, Any]:
    """The arguments of ``export`` that a recipe file gives: those of the function named by ``model.source``, and the
    model of ``model.file`` or ``model.checkpoint`` where the file has one.

    Paths are relative to the recipe file.

    Raises:
        ConfigError: a key is missing or does not go with another, there is no such function, it raised, or it gave
            other keys.
        ExportError: the checkpoint is refused.
        MissingExtra: it imports a tool that is not installed.
    """
    _check_keys(file)
    where = f"{file.path}: model.source"
    given = call_reference(file.source, where)
    where = f"{where} {file.source!r}"
    separate = bool(file.model_file or file.checkpoint)
    needed = (*(() if separate else ("model",)), *(() if file.model_file else DESCRIBED), *ALWAYS)
    allowed = (*needed, *(DESCRIBED if file.model_file else ()), *OPTIONAL)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} gave a {type(given).__name__}, expected a mapping with {', '.join(needed)}")
    for key in given:
        if key not in allowed:
            raise ConfigError(f"{where} gave an unknown key {key!r}", hint=f"the keys are {', '.join(allowed)}")
    for key in needed:
        if key not in given:
            raise ConfigError(f"{where} gave no {key!r}", hint=f"it must give {', '.join(needed)}")
    return {**given, "model": _model(file)} if separate else dict(given)


def call_reference(reference: str, where: str) -> Any:
    """Import ``module``, call its ``function`` without arguments, give what it returns.

    Args:
        reference: ``module:function``.
        where: what names it, for errors: ``recipe.toml: model.build``.

    Raises:
        ConfigError: it is no reference, there is no such function, or it raised.
        MissingExtra: it imports a tool that is not installed.
    """
    module_name, colon, function_name = reference.partition(":")
    if not (module_name and colon and function_name):
        key = where.rpartition(".")[2]
        raise ConfigError(f"{where} is {reference!r}", hint=f'[model] {key} = "module:function"')
    named = f"{where} {reference!r}"
    function = getattr(_import(module_name, named), function_name, None)
    if not callable(function):
        raise ConfigError(f"{named}: the module has no function {function_name!r}")
    return _call(function, named)


def _check_keys(file: RecipeFile) -> None:
    if file.model_file and (file.checkpoint or file.build):
        raise ConfigError(f"{file.path}: model.file and model.checkpoint are both given", hint="one model, one key")
    if bool(file.checkpoint) != bool(file.build):
        missing = "build" if file.checkpoint else "checkpoint"
        raise ConfigError(
            f"{file.path}: model.{missing} is missing",
            hint='[model] checkpoint = "weights.safetensors" and build = "module:function" go together',
        )


def _model(file: RecipeFile) -> Any:
    folder = Path(file.path).parent
    if file.model_file:
        return folder / file.model_file
    from outrider_exporters.sources.checkpoints import load_checkpoint

    return load_checkpoint(
        folder / file.checkpoint, build=lambda: call_reference(file.build, f"{file.path}: model.build")
    )


def _import(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        _raise_missing_tool(error)
        raise ConfigError(
            f"{where}: there is no module {error.name!r}", hint="the module stands beside the recipe, or is installed"
        ) from error
    except Exception as error:
        raise ConfigError(f"{where}: importing it raised {type(error).__name__}: {error}") from error


def _call(function: Callable[[], Any], where: str) -> Any:
    try:
        return function()
    except ModuleNotFoundError as error:
        _raise_missing_tool(error)
        raise ConfigError(f"{where}: there is no module {error.name!r}") from error
    except Exception as error:
        raise ConfigError(f"{where} raised {type(error).__name__}: {error}") from error


def _raise_missing_tool(error: ModuleNotFoundError) -> None:
    package = (error.name or "").partition(".")[0]
    if package in TOOLS:
        raise MissingExtra(package, extra="export", purpose="outrider export") from error
