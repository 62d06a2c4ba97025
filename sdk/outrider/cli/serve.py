"""``serve``: the cloud endpoint."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.options import add_state, add_trust

if TYPE_CHECKING:
    from outrider.cli import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "serve",
        run=_serve,
        render=lambda result: "stopped",
        summary="Serve bundles over the Open Inference Protocol v2 until SIGTERM or Ctrl-C. "
        "Callers must send the token in OUTRIDER_TOKEN, if there is one.",
        example="outrider serve digits-large.outrider --port 8000",
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port")
    add_trust(parser)
    add_state(parser)


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.endpoint import serve

    served: list[str] = []

    def ready(url: str) -> None:
        served.append(url)
        print(f"serving {', '.join(path.name for path in args.bundles)} on {url}", file=sys.stderr, flush=True)

    serve(
        args.bundles,
        host=args.host,
        port=args.port,
        trust=args.trust,
        state=args.state,
        token=os.environ.get("OUTRIDER_TOKEN"),
        ready=ready,
    )
    return {"url": served[0] if served else None}
