"""Programs in processes of their own, each from its start to its first line, with what they used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# A child's own account of its peak: what wait4 tells is never below what its parent held when it was forked.
PEAK = """
import sys as _sys
_sys.stdout.flush()
with open("/proc/self/status") as _status:
    print(next(_line.split()[1] for _line in _status if _line.startswith("VmHWM")))
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run.

    Attributes:
        first_line_ms: from the start of the process to the first line of its output.
        peak_bytes: the most memory that it held.
        said: that line, which is JSON.
    """

    first_line_ms: float
    peak_bytes: int
    said: Any


def run_program(program: str, *arguments: str, cache: Path | None = None) -> Ran:
    """Run Python source text that prints one line of JSON.

    Args:
        cache: where compiled modules are kept, as pip leaves them beside installed ones; by default none are written.

    Raises:
        RuntimeError: it failed; with what it wrote of that.
    """
    environment = dict(os.environ)
    if cache is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(cache)
    with tempfile.TemporaryFile() as errors:
        begun = time.perf_counter()
        command = [sys.executable, "-c", program + PEAK, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            first_line_ms = (time.perf_counter() - begun) * 1e3
            peak_kb = process.stdout.read()
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace"))
    return Ran(first_line_ms=first_line_ms, peak_bytes=int(peak_kb) * 1024, said=json.loads(line))


def interleaved_runs(
    programs: Mapping[str, Sequence[str]], *, rounds: int, rng: np.random.Generator, cache: Path | None = None
) -> dict[str, list[Ran]]:
    """Each program (source and arguments) once a round, in ``balanced_orders``; one round before is not kept."""
    runs: dict[str, list[Ran]] = {name: [] for name in programs}
    for name in programs:
        run_program(*programs[name], cache=cache)
    for order in balanced_orders(list(programs), rounds, rng):
        for name in order:
            runs[name].append(run_program(*programs[name], cache=cache))
    return runs


def balanced_orders(names: Sequence[str], rounds: int, rng: np.random.Generator) -> list[list[str]]:
    """The order of each round: in every ``len(names)`` rounds each name stands once in each position.

    An order is drawn, followed by its rotations, then another one is drawn: what a run leaves behind for the next one,
    in caches and in the processor's clock, falls on all alike.
    """
    orders: list[list[str]] = []
    while len(orders) < rounds:
        drawn = [names[at] for at in rng.permutation(len(names))]
        orders += [drawn[shift:] + drawn[:shift] for shift in range(len(names))]
    return orders[:rounds]
