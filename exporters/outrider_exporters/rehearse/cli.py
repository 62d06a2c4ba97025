"""``outrider rehearse``. Importing this imports neither an engine nor what makes userlands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.options import add_trust, number
from outrider_exporters.rehearse.plan import TIMEOUT_S
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.targets import TARGETS

if TYPE_CHECKING:
    from outrider.cli import Commands
    from outrider_exporters.rehearse.report import Rehearsal


LONGEST_S = 7 * 86_400.0


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "rehearse",
        run=_run,
        render=_render,
        failed=lambda result: not result["passed"] and not result["written"],
        summary="Run a bundle with a board's own packages and wheels on that board's CPU, emulated by qemu, and "
        "compare every golden answer. The first run for a 64-bit and for a 32-bit board makes its userland from "
        "Debian's packages and keeps it. Says nothing of speed: an emulator's times mean nothing.",
        example="outrider rehearse digits.outrider --target pi4 --target pi-32bit",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--target", action="append", required=True, choices=list(TARGETS), help="the board; repeatable", dest="targets"
    )
    parser.add_argument(
        "--timeout",
        type=number(1, LONGEST_S),
        default=TIMEOUT_S,
        metavar="S",
        help="for one variant on one engine (default: %(default)g)",
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where userlands are kept (default: the user's)")
    parser.add_argument("--sources", type=Path, metavar="FILE", help="a sources.list for apt (default: this machine's)")
    parser.add_argument(
        "--write-tolerance",
        type=Path,
        metavar="FILE",
        help="write a bundle whose tolerances are the largest differences that were measured",
    )
    parser.add_argument("--key", type=Path, action="append", default=[], help="a private key that signs that bundle")
    add_trust(parser)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import find_trust
    from outrider_exporters.rehearse.run import rehearse

    if args.key and args.write_tolerance is None:
        raise ConfigError("--key signs what --write-tolerance writes, and that was not asked for")
    found = rehearse(
        args.bundle,
        args.targets,
        cache=args.cache,
        sources=args.sources,
        trust=find_trust(args.trust),
        timeout_s=args.timeout,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    written = None if args.write_tolerance is None else _write(found, args)
    return {**found.to_dict(), "written": written}


def _write(found: Rehearsal, args: argparse.Namespace) -> dict[str, Any]:
    from outrider.bundle import load_private_key
    from outrider_exporters.rehearse.tolerance import write_tolerance

    return write_tolerance(found, args.write_tolerance, keys=[load_private_key(key) for key in args.key])


def _render(result: dict[str, Any]) -> str:
    from outrider_exporters.rehearse.report import render

    return render(result)
