"""``python -m benchmarks [SUITE ...]``: measure, store the results, rewrite the README's figures.

Without names, what takes a minute: ``overhead`` and ``variants``. What a device promises is ``overhead coldstart idle
grid``, five minutes on a quiet machine. ``exporters`` takes a quarter of an hour and can be taken apart: ``--make
DIR``, then ``--measure DIR``. Both want a quiet machine: an export chooses by the times that it measures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import (
    cascade,
    client,
    coldstart,
    endpoint,
    grid,
    idle,
    install,
    overhead,
    overload,
    overshoot,
    ray_serve,
    readme,
    risk,
    telemetry,
    variants,
)
from benchmarks.exporters import picture, suite
from benchmarks.exporters.subjects import SUBJECTS
from benchmarks.measure import say, write_results

SUITES = {
    "overhead": overhead.run,
    "variants": variants.run,
    "coldstart": coldstart.run,
    "idle": idle.run,
    "grid": grid.run,
    "install": install.run,
    "overshoot": overshoot.run,
    "client": client.run,
    "cascade": cascade.run,
    "risk": risk.run,
    "overload": overload.run,
    "telemetry": telemetry.run,
    "endpoint": endpoint.run,
    "ray_serve": ray_serve.run,
    "exporters": suite.run,
}
QUICK = ("overhead", "variants")


def main(arguments: list[str]) -> int:
    """Run the named suites, or the quick ones."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if unknown := set(asked.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; the suites are {', '.join(SUITES)}")
    if asked.make is not None:
        suite.make(asked.make, asked.only)
    elif asked.measure is not None and asked.glance:
        suite.measure(asked.measure, glance=True)
    elif asked.measure is not None:
        _store("exporters", suite.measure(asked.measure))
    else:
        for name in asked.suites or QUICK:
            with tempfile.TemporaryDirectory() as folder:
                _store(name, SUITES[name](Path(folder)))
    return 0


def _store(name: str, figures: dict[str, Any]) -> None:
    say(str(write_results(name, figures)))
    if name == "exporters":
        picture.draw(figures)
    readme.rewrite()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure beside the peers.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; else {', '.join(QUICK)}")
    parser.add_argument("--make", type=Path, metavar="DIR", help="make the exporters' files there, and measure nothing")
    parser.add_argument("--only", nargs="+", default=(), choices=[s.name for s in SUBJECTS], help="with --make: these")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure the exporters' files that are there")
    parser.add_argument("--glance", action="store_true", help="with --measure: a few blocks, and nothing is stored")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
