"""``infer``: one batch through a bundle, an installed name or an endpoint."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.cli.options import add_state, add_trust
from outrider.cli.text import aligned
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InputError
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from outrider.cli import Commands

REMOTE_DEADLINE_MS = 30_000.0


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "infer",
        run=_infer,
        render=_render,
        summary="Run one batch: arrays by input name from an .npz file, outputs into another.",
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
    with args.output.open("wb") as file:
        np.savez(file, allow_pickle=False, **outputs)
    shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in outputs.items()}
    return {"output": str(args.output), "outputs": shapes, **facts}


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name. Raises InputError; nothing in the file is ever executed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise InputError(f"{path} holds one unnamed array", hint="np.savez(path, NAME=array)")
            return {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {error}", hint="np.savez(path, NAME=array)"
        ) from None


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

    url, _, name = args.model.rstrip("/").rpartition("/")
    deadline = Deadline.after_ms(args.deadline_ms or REMOTE_DEADLINE_MS)
    remote = outrider.Remote(url, model=name)
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
