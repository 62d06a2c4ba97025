"""``outrider export`` and ``outrider package``. Importing this imports neither torch nor a converter."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from outrider.cli import Commands
    from outrider_exporters.passes import Progress
    from outrider_exporters.recipe import RecipeFile

NEEDED = ("model", "example", "outputs", "data", "evaluate")
ALLOWED = (*NEEDED, "fit", "teacher")
TOOLS = ("torch", "onnx", "onnxruntime", "litert_torch", "ai_edge_litert", "ai_edge_quantizer", "torch_pruning")


def register(commands: Commands) -> None:
    """Add the commands."""
    export = commands.add(
        "export",
        run=_export,
        render=_render_export,
        summary="Make a bundle of a trained network by a recipe: prune, distil, quantize, convert, measure, gate.",
        example="outrider export recipe.toml --output digits.outrider --key keys/release.key",
    )
    export.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    export.add_argument("--output", type=Path, required=True, metavar="FILE", help="the bundle to write")
    export.add_argument("--key", type=Path, action="append", default=[], help="a private key that signs; repeatable")

    package = commands.add(
        "package",
        run=_package,
        render=_render_package,
        summary="Make a bundle of an existing .onnx or .tflite file as it is.",
        example="outrider package model.onnx --output model.outrider",
    )
    package.add_argument("file", type=Path, metavar="FILE", help="an .onnx or a .tflite file")
    package.add_argument("--output", type=Path, required=True, metavar="FILE", help="the bundle to write")
    package.add_argument("--name", help="the bundle's name (default: made from the model file's)")
    package.add_argument("--version", type=int, default=1, help="the bundle's version (default: 1)")
    package.add_argument("--key", type=Path, action="append", default=[], help="a private key that signs; repeatable")


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import load_private_key
    from outrider_exporters.export import export
    from outrider_exporters.recipe import RecipeFile

    file = RecipeFile.from_toml(args.recipe)
    keys = [load_private_key(path) for path in args.key]
    with _on_path(args.recipe.absolute().parent):
        report = export(
            **arguments_from(file),
            recipe=file.recipe,
            formats=file.formats,
            targets=file.targets,
            gates=file.gates,
            name=file.name,
            version=file.version,
            labels=file.labels,
            seed=file.seed,
            signing_keys=keys,
            output=args.output,
            progress=_show,
        )
    return report.to_dict()


def _package(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import load_private_key
    from outrider_exporters.package import package

    keys = [load_private_key(path) for path in args.key]
    return package(args.file, output=args.output, name=args.name, version=args.version, signing_keys=keys).to_dict()


def arguments_from(file: RecipeFile) -> dict[str, Any]:
    """The arguments of ``export`` that the function named by ``model.source`` gives.

    Raises:
        ConfigError: the key is missing, there is no such function, it raised, or it gave other keys.
        MissingExtra: it imports a tool that is not installed.
    """
    module_name, colon, function_name = file.source.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"{file.path}: model.source is {file.source!r}", hint='[model] source = "module:function"')
    where = f"{file.path}: model.source {file.source!r}"
    function = getattr(_import(module_name, where), function_name, None)
    if not callable(function):
        raise ConfigError(f"{where}: the module has no function {function_name!r}")
    given = _call(function, where)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} gave a {type(given).__name__}, expected a mapping with {', '.join(NEEDED)}")
    for key in given:
        if key not in ALLOWED:
            raise ConfigError(f"{where} gave an unknown key {key!r}", hint=f"the keys are {', '.join(ALLOWED)}")
    for key in NEEDED:
        if key not in given:
            raise ConfigError(f"{where} gave no {key!r}", hint=f"it must give {', '.join(NEEDED)}")
    return dict(given)


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


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The recipe's folder first on ``sys.path``: its module may import its neighbours at any time."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _show(progress: Progress) -> None:
    text = progress.message or f"{progress.done} of {progress.total}"
    print(f"{progress.step}: {text}", file=sys.stderr, flush=True)


def _render_export(result: dict[str, Any]) -> str:
    from outrider.cli.text import aligned, bytes_text

    metrics = sorted(result["baseline"]["metrics"])
    rows = [["", "parameters", "MACs", *metrics]]
    for stage in (result["baseline"], *result["stages"]):
        figures = [f"{stage['metrics'][name]:.4f}" for name in metrics]
        rows.append([stage["name"], f"{stage['parameters']:,}", f"{stage['macs']:,}", *figures])
    variants = [["variant", "size", "ms on this host", *metrics]]
    for variant in result["variants"]:
        figures = [f"{variant['metrics'][name]:.4f}" for name in metrics]
        latency = f"{variant['latency_host_ms_p50']:.3f}"
        variants.append([variant["name"], bytes_text(variant["size_bytes"]), latency, *figures])
    bundle = result["bundle"]
    wrote = f"{bundle['path']}: {result['name']} version {result['version']}, {bytes_text(bundle['size_bytes'])}"
    return "\n\n".join([aligned(rows), aligned(variants), wrote])


def _render_package(result: dict[str, Any]) -> str:
    from outrider.cli.text import bytes_text

    size = bytes_text(result["size_bytes"])
    return f"{result['path']}: {result['name']} version {result['version']}, {result['variant']}, {size}"
