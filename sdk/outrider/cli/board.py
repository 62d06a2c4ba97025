"""``install`` and ``rollback``: what changes a board's store."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.options import LEAST_MS, MOST_MS, add_state, add_trust, number
from outrider.cli.text import aligned, batches_text, threads_text

if TYPE_CHECKING:
    from outrider.cli import Commands

CELL = ("variant", "engine", "threads")


def register(commands: Commands) -> None:
    """Add the commands."""
    install = commands.add(
        "install",
        run=_install,
        render=_render_install,
        summary="Verify a bundle, try it in a child process, measure it on this board and make it the current one.",
        example="outrider install digits.outrider --trust keys/release.pub",
    )
    install.add_argument("bundle", type=Path, metavar="BUNDLE")
    install.add_argument(
        "--latency-ms", type=number(LEAST_MS, MOST_MS), help="refuse it where the median call takes longer than this"
    )
    add_trust(install)
    add_state(install)

    rollback = commands.add(
        "rollback",
        run=_rollback,
        render=lambda result: f"{result['name']}: back to version {result['version']} ({result['digest']})",
        summary="Go back to the bundle that was current before.",
        example="outrider rollback digits",
    )
    rollback.add_argument("name", metavar="NAME")
    add_state(rollback)


def _install(args: argparse.Namespace) -> dict[str, Any]:
    import outrider
    from outrider.admit.admit import default_limits

    limits = dataclasses.replace(default_limits(), latency_ms=args.latency_ms)
    return outrider.install(args.bundle, trust=args.trust, state=args.state, limits=limits).to_dict()


def _rollback(args: argparse.Namespace) -> dict[str, Any]:
    import outrider

    return outrider.rollback(args.name, state=args.state).to_dict()


def _render_install(result: dict[str, Any]) -> str:
    choice = result["choice"]
    chosen = [choice[key] for key in CELL]
    measured = [
        [
            f"{'*' if [row[key] for key in CELL] == chosen else ' '} {row['variant']}",
            row["engine"],
            threads_text(row["threads"]),
            f"{row['p50_ms'] * 1000:.0f} us",
            f"{row['runs']} calls",
        ]
        for row in result["measured"]
    ]
    rows = [
        ["installed", f"{result['name']} version {result['version']}"],
        ["digest", result["digest"]],
        ["verified", "yes" if result["verified"] else "no key is trusted here"],
        ["serves", f"{choice['variant']} on {choice['engine']}, {threads_text(choice['threads'])}"],
        ["because", choice["reason"] + ("" if result["admitted"] else "; measured at an earlier install")],
        ["batches", batches_text(result["batches"])],
    ]
    skipped = [
        ["  " + " on ".join(filter(None, (row["variant"], row["engine"]))), row["reason"]] for row in result["skipped"]
    ]
    parts = [aligned(rows), "measured, median", aligned(measured)]
    if skipped:
        parts += ["left out", aligned(skipped)]
    return "\n".join(parts)
