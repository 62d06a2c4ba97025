"""The commands, and the running of one.

A command is an argparse subparser whose defaults hold ``run``, a function from the parsed arguments to the JSON
object that ``--json`` prints, and ``render``, a function from that object to the text that a person reads. Commands
of other packages come in by the entry point group ``outrider.commands``: each names a function that takes a
``Commands`` and adds to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from outrider._version import __version__
from outrider.cli import agent, board, bundles, doctor, infer, serve, watch
from outrider.cli.streams import silence_stdout, written
from outrider.cli.text import shown
from outrider_runtimes.errors import OutriderError

Run = Callable[[argparse.Namespace], dict[str, Any]]
Render = Callable[[dict[str, Any]], str]
Failed = Callable[[dict[str, Any]], bool]

DONE, FAILED = 0, 1  # argparse itself exits with 2 for wrong usage


class Commands:
    """Where commands are added."""

    def __init__(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        self._subparsers = subparsers

    def add(
        self,
        name: str,
        *,
        run: Run,
        render: Render,
        summary: str,
        example: str,
        failed: Failed = lambda result: False,
    ) -> argparse.ArgumentParser:
        """Add one command and return its parser, which has ``--json`` and ``--debug`` already.

        ``failed`` says of a result that is printed like any other that the command ends with exit code 1.
        """
        parser = self._subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        parser.set_defaults(run=run, render=render, failed=failed)
        return parser


def build_parser() -> argparse.ArgumentParser:
    """The parser with the commands of every installed package."""
    parser = argparse.ArgumentParser(
        prog="outrider",
        description="Take a trained model to a small board and keep it honest there.",
        epilog="`outrider COMMAND --help` says more, with an example. Exit code: 0 done, 1 refused or failed, "
        "2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"outrider {__version__}")
    commands = Commands(parser.add_subparsers(metavar="COMMAND", required=True))
    for room in (bundles, board, doctor, infer, serve, agent, watch):
        room.register(commands)
    for entry in sorted(metadata.entry_points(group="outrider.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Run one command and return its exit code. A reader of standard output that has gone is no fault to tell of."""
    try:
        return _run(argv)
    except BrokenPipeError:
        silence_stdout()
        return FAILED


def _run(argv: Sequence[str] | None) -> int:
    as_json, debug = False, False
    try:
        args = _parsed(argv)
        as_json, debug = args.json, args.debug
        result = args.run(args)
        _print(json.dumps(result, allow_nan=False) if as_json else shown(args.render(result)))
    except BrokenPipeError:
        raise
    except Exception as error:
        return _report(error, as_json=as_json, debug=debug)
    return FAILED if args.failed(result) else DONE


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return build_parser().parse_args(argv)
    except SystemExit:
        with written():  # the help: that nobody reads it is seen here, not at the interpreter's end
            sys.stdout.flush()
        raise


def _print(text: str) -> None:
    with written():
        print(text, end="\n" if text else "", flush=True)  # what the command itself has printed goes out here too


def _report(error: Exception, *, as_json: bool, debug: bool) -> int:
    what, hint = _explain(error)
    if debug:
        traceback.print_exception(error)
    print(shown(f"error: {what}"), file=sys.stderr)
    if hint:
        print(shown(f"hint: {hint}"), file=sys.stderr)
    if as_json:
        with contextlib.suppress(OutriderError):  # standard output cannot be written; what went wrong first was told
            _print(json.dumps({"error": {"type": type(error).__name__, "message": what, "hint": hint}}))
    return FAILED


def _explain(error: Exception) -> tuple[str, str]:
    if isinstance(error, OutriderError):
        return str(error), error.hint
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}", ""
    return (
        f"unexpected {type(error).__name__}: {error}",
        "this is a fault of Outrider's; run it again with --debug and report what it prints",
    )
