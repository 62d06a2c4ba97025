"""``outrider export`` and ``outrider package``. Importing this imports neither torch nor a converter."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.cli import Commands
    from outrider_exporters.passes import Progress


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
    _add_output(export)
    export.add_argument("--report", type=Path, metavar="FILE", help="an .html report; the same as JSON beside it")

    package = commands.add(
        "package",
        run=_package,
        render=_render_package,
        summary="Make a bundle of an existing .onnx or .tflite file as it is.",
        example="outrider package model.onnx --output model.outrider",
    )
    package.add_argument("file", type=Path, metavar="FILE", help="an .onnx or a .tflite file")
    _add_output(package)
    package.add_argument("--name", help="the bundle's name (default: made from the model file's)")
    package.add_argument("--version", type=int, default=1, help="the bundle's version (default: 1)")
    package.add_argument("--cloud-only", action="store_true", help="a board that has a cloud asks it first")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the bundle to write")
    parser.add_argument("--key", type=Path, action="append", default=[], help="a private key that signs; repeatable")


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import load_private_key
    from outrider_exporters.export import export
    from outrider_exporters.recipe import RecipeFile
    from outrider_exporters.recipe.model import arguments_from

    file = RecipeFile.from_toml(args.recipe)
    keys = [load_private_key(path) for path in args.key]
    with _on_path(args.recipe.absolute().parent):
        report = export(
            **arguments_from(file),
            recipe=file.recipe,
            formats=file.formats or None,
            targets=file.targets,
            gates=file.gates,
            offload=file.offload,
            cloud_only=file.cloud_only,
            name=file.name,
            version=file.version,
            labels=file.labels,
            seed=file.seed,
            dynamic_axes=file.dynamic_axes,
            shapes=file.shapes,
            state=file.state,
            signing_keys=keys,
            output=args.output,
            report=args.report,
            command=_command(args),
            progress=_show,
        )
    return report.to_dict()


def _command(args: argparse.Namespace) -> str:
    """The command line, without the keys: where they are is nobody's business but the signer's."""
    parts = ["outrider", "export", str(args.recipe), "--output", str(args.output)]
    return shlex.join([*parts, *(["--report", str(args.report)] if args.report else [])])


def _package(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import load_private_key
    from outrider_exporters.package import package

    keys = [load_private_key(path) for path in args.key]
    report = package(
        args.file,
        output=args.output,
        name=args.name,
        version=args.version,
        signing_keys=keys,
        cloud_only=args.cloud_only,
    )
    return report.to_dict()


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The recipe's folder first on ``sys.path``: its module may import its neighbours at any time."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _show(progress: Progress) -> None:
    from outrider_exporters.progress import duration_text

    text = progress.message or f"{progress.done} of {progress.total}"
    left = "" if progress.left_s is None else f" (about {duration_text(progress.left_s)} left)"
    print(f"{progress.step}: {text}{left}", file=sys.stderr, flush=True)


def _render_export(result: dict[str, Any]) -> str:
    from outrider.cli.text import aligned, bytes_text
    from outrider_exporters.report import count_text

    metrics = sorted(result["baseline"]["metrics"])
    rows = [["", "parameters", "MACs", *metrics]]
    for stage in (result["baseline"], *result["stages"]):
        figures = [f"{stage['metrics'][name]:.4f}" for name in metrics]
        rows.append([stage["name"], f"{stage['parameters']:,}", count_text(stage["macs"]), *figures])
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
