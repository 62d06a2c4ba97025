"""``infer``: one batch through a bundle, an installed name or an endpoint."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.bundle.files import atomic_file
from outrider.cli.options import add_state, add_trust
from outrider.cli.text import aligned
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, InputError, OutriderError
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from outrider.cli import Commands

REMOTE_DEADLINE_MS = 30_000.0
LOCAL_OPTIONS = ("variant", "engine", "threads", "trust", "state")


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "infer",
        run=_infer,
        render=_render,
        summary="Run one batch: arrays by input name from an .npz file, outputs into another. An endpoint gets the "
        "token in OUTRIDER_TOKEN, if there is one.",
        example="outrider infer digits.outrider --input images.npz --output answers.npz\n"
        "  outrider infer http://host:8000/digits-large --input images.npz --output answers.npz",
    )
    parser.add_argument("model", metavar="BUNDLE|NAME|URL/MODEL")
    parser.add_argument("--input", type=Path, required=True, help="an .npz file with one array an input")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--deadline-ms", type=float, help="give up after this time")
    parser.add_argument("--variant", help="not the one that was chosen at install")
    parser.add_argument("--engine", help="not the one that was chosen at install")
    parser.add_argument("--threads", type=int, help="not the number that was chosen at install")
    add_trust(parser)
    add_state(parser)


def _infer(args: argparse.Namespace) -> dict[str, Any]:
    inputs = read_arrays(args.input)
    remote = args.model.startswith(("http://", "https://"))
    outputs, facts = _ask(args, inputs) if remote else _run(args, inputs)
    write_arrays(args.output, outputs)
    shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in outputs.items()}
    return {"output": str(args.output), "outputs": shapes, **facts}


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name. Raises InputError; nothing in the file is ever executed."""
    hint = "np.savez(path, NAME=array)"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds one unnamed array", hint=hint)
        with file:
            return {name: file[name] for name in file.files}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", hint="check the path") from None
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a file that is not sound
        raise InputError(f"{path} is not an .npz file of plain arrays: {error}", hint=hint) from None


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """An .npz file, whole or not at all; unlike ``np.savez`` it takes any name. Raises OutriderError."""
    try:
        with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    except OSError as error:
        raise OutriderError(f"{path} cannot be written: {error.strerror or error}", hint="check the folder") from None


def _run(args: argparse.Namespace, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
    import outrider

    with outrider.load(
        args.model,
        trust=args.trust,
        state=args.state,
        engine=args.engine,
        variant=args.variant,
        threads=args.threads,
    ) as model:
        prediction = model.infer(inputs, deadline_ms=args.deadline_ms)
    facts = {
        "source": "edge",
        "variant": prediction.variant,
        "engine": prediction.engine,
        "bundle": prediction.bundle,
        "verified": prediction.verified,
        "total_ms": prediction.timing_ms.total,
    }
    return prediction.outputs, facts


def _ask(args: argparse.Namespace, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
    import outrider

    for option in LOCAL_OPTIONS:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option} is for a bundle on this board; {args.model} is an endpoint's")
    url, _, name = args.model.rstrip("/").rpartition("/")
    deadline = Deadline.after_ms(REMOTE_DEADLINE_MS if args.deadline_ms is None else args.deadline_ms)
    remote = outrider.Remote(url, model=name, token=os.environ.get("OUTRIDER_TOKEN"))
    try:
        remote.connect(deadline)
        answer = remote.submit(inputs, deadline).result()
        facts = {
            "source": "cloud",
            "variant": remote.variant,
            "bundle": remote.bundle,
            "total_ms": answer.timing_ms.total,
        }
        return answer.outputs, facts
    finally:
        remote.close()


def _render(result: dict[str, Any]) -> str:
    rows = [
        ["wrote", result["output"]],
        *([name, f"{spec['dtype']} {spec['shape']}"] for name, spec in result["outputs"].items()),
        ["answered by", " on ".join(filter(None, (result["variant"], result.get("engine")))) or result["source"]],
        ["took", f"{result['total_ms']:.2f} ms"],
    ]
    return aligned(rows)
