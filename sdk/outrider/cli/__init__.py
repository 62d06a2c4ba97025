"""The command line. ``main`` is what the ``outrider`` script calls.

Little is imported with this module: what takes long, numpy before all, comes inside ``main``, where Ctrl-C is caught.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from outrider.cli.streams import prepare_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outrider.cli.commands import Commands, build_parser

__all__ = ["Commands", "build_parser", "main"]

INTERRUPTED = 130  # as a shell has it: 128 and SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises SystemExit, as argparse does: 0 for help, 2 for wrong usage."""
    prepare_streams()
    try:
        from outrider.cli.commands import run

        return run(argv)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


def __getattr__(name: str) -> Any:
    if name not in ("Commands", "build_parser"):
        raise AttributeError(f"module 'outrider.cli' has no attribute {name!r}")
    from outrider.cli import commands

    return getattr(commands, name)
