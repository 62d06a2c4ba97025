"""``infer``: one batch through a bundle, an installed name or an endpoint."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.admit.admission import MAX_THREADS
from outrider.bundle.files import atomic_file
from outrider.cli.options import LEAST_MS, MOST_MS, add_state, add_trust, number, whole_number
from outrider.cli.text import aligned
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, InputError, OutriderError, RemoteUnavailable
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    import outrider
    from outrider.cli import Commands

REMOTE_DEADLINE_MS = 30_000.0
ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # how an archive begins, and an empty one
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
        "  outrider infer http://host:8000/digits-large --input images.npz --output answers.npz\n"
        "  outrider infer http://a:8000/digits-large http://b:8000/digits-large --input many.npz --output answers.npz",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="BUNDLE|NAME|URL/MODEL",
        help="several endpoints share one batch, which is split along N; what one does not answer goes to another",
    )
    parser.add_argument("--input", type=Path, required=True, help="an .npz file with one array an input")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument(
        "--deadline-ms",
        type=number(LEAST_MS, MOST_MS),
        help="give up after this time (default: an endpoint after 30 s)",
    )
    parser.add_argument("--variant", help="not the one that was chosen at install")
    parser.add_argument("--engine", help="not the one that was chosen at install")
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), help="not the number that was chosen at install"
    )
    add_trust(parser)
    add_state(parser)


def _infer(args: argparse.Namespace) -> dict[str, Any]:
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ConfigError(f"{args.output} is the input too, and would be lost", hint="give --output another name")
    inputs = read_arrays(args.input)
    remote = ["://" in model for model in args.models]
    if len(remote) > 1 and not all(remote):
        local = args.models[remote.index(False)]
        raise ConfigError(f"{local} is not an endpoint's URL/MODEL", hint="a batch is shared by endpoints alone")
    outputs, facts = _ask(args, inputs) if all(remote) else _run(args, inputs)
    write_arrays(args.output, outputs)
    shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in outputs.items()}
    return {"output": str(args.output), "outputs": shapes, **facts}


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name. Raises InputError; nothing in the file is ever executed."""
    hint = "np.savez(path, NAME=array)"
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file", hint=hint)  # a pipe would be waited for
    try:
        with path.open("rb") as opened:
            if opened.read(4) not in ZIP:  # of anything else numpy says how to load it unsafely
                raise InputError(f"{path} is not an .npz file", hint=hint)
        with np.load(path, allow_pickle=False) as file:
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
        args.models[0],
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
            raise ConfigError(f"--{option} is for a bundle on this board; {args.models[0]} is an endpoint's")
    deadline = Deadline.after_ms(REMOTE_DEADLINE_MS if args.deadline_ms is None else args.deadline_ms)
    token = os.environ.get("OUTRIDER_TOKEN")
    with contextlib.ExitStack() as stack:
        remotes = [
            stack.enter_context(outrider.Remote(url, model=name, token=token))
            for url, name in map(_address, args.models)
        ]
        try:
            return _ask_one(remotes[0], inputs, deadline) if len(remotes) == 1 else _ask_all(remotes, inputs, deadline)
        except RemoteUnavailable as error:
            hint = error.hint or "check the address, and that `outrider serve` runs there"
            raise RemoteUnavailable(str(error), unsent=error.unsent, hint=hint) from None


def _address(model: str) -> tuple[str, str]:
    """URL/MODEL taken apart. Raises ConfigError where there is no model."""
    url, _, name = model.rstrip("/").rpartition("/")
    if url.endswith(":/"):
        raise ConfigError(f"{model} names no model", hint="URL/MODEL, such as http://host:8000/digits-large")
    return url, name


def _ask_one(
    remote: outrider.Remote, inputs: dict[str, Array], deadline: Deadline
) -> tuple[dict[str, Array], dict[str, Any]]:
    remote.connect(deadline)
    answer = remote.submit(inputs, deadline).result()
    facts = {
        "source": "cloud",
        "variant": remote.variant,
        "bundle": remote.bundle,
        "total_ms": answer.timing_ms.total,
    }
    return answer.outputs, facts


def _ask_all(
    remotes: Sequence[outrider.Remote], inputs: dict[str, Array], deadline: Deadline
) -> tuple[dict[str, Array], dict[str, Any]]:
    from outrider.fanout import Share, fan_out, introduce

    begun_s = time.monotonic()
    interface, away = introduce(remotes, deadline)
    there = [remote for at, remote in enumerate(remotes) if at not in away]
    found = fan_out(there, interface, inputs, deadline)
    worked = iter(found.shares)
    shares = [Share(said=str(away[at])) if at in away else next(worked) for at in range(len(remotes))]
    endpoints = [{"url": each.url, **dataclasses.asdict(share)} for each, share in zip(remotes, shares, strict=True)]
    facts = {
        "source": "cloud",
        "variant": there[0].variant,
        "bundle": there[0].bundle,
        "endpoints": endpoints,
        "total_ms": (time.monotonic() - begun_s) * 1e3,
    }
    return found.outputs, facts


def _render(result: dict[str, Any]) -> str:
    rows = [
        ["wrote", result["output"]],
        *([name, f"{spec['dtype']} {spec['shape']}"] for name, spec in result["outputs"].items()),
        ["answered by", " on ".join(filter(None, (result["variant"], result.get("engine")))) or result["source"]],
        *([each["url"], _worked(each)] for each in result.get("endpoints", ())),
        ["took", f"{result['total_ms']:.2f} ms"],
    ]
    return aligned(rows)


def _worked(endpoint: Mapping[str, Any]) -> str:
    rows = f"{endpoint['rows']} rows"
    return f"{rows}; {endpoint['failures']} parts failed, {endpoint['said']}" if endpoint["said"] else rows
