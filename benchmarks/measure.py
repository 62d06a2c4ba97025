"""Interleaved timing: shuffled blocks, warm-ups discarded, every contender in one run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stats import Comparison, Times, compare

RESULTS = Path(__file__).with_name("results")
PACKAGES = (
    "outrider", "numpy", "torch", "onnx", "onnxruntime", "litert-torch", "ai-edge-litert", "ai-edge-quantizer",
    "torch-pruning",
)  # fmt: skip
SOURCES = ("runtimes", "sdk", "exporters", "benchmarks/*.py", "benchmarks/exporters")
TRIES = 3
TWIN = " (twin)"
WARM_UP_CALLS = 5

Call = Callable[[], object]


def interleaved(
    calls: Mapping[str, Call], *, blocks: int, calls_a_block: int, rng: np.random.Generator
) -> dict[str, Times]:
    """Nanoseconds of each call, float64 [blocks, calls_a_block] by contender; the order is drawn anew each block."""
    times = {name: np.empty((blocks, calls_a_block)) for name in calls}
    names = list(calls)
    for block in range(blocks):
        for name in rng.permutation(names):
            call, row = calls[name], times[name][block]
            for _ in range(WARM_UP_CALLS):
                call()
            for position in range(calls_a_block):
                begun = time.perf_counter_ns()
                call()
                row[position] = time.perf_counter_ns() - begun
    return times


def compare_calls(
    calls: Mapping[str, Call],
    *,
    base: str,
    blocks: int,
    calls_a_block: int,
    twin: Call | None = None,
) -> tuple[Comparison, dict[str, Times]]:
    """Compare, with a twin of the base; again, up to three times in all, while the twin says that it was noise.

    Args:
        twin: does what the base does, say from a second opening of the same file; the base itself when left out.

    Returns:
        The comparison, and the times behind it in nanoseconds, by contender.
    """
    rng = np.random.default_rng(0)
    with_twin = {**calls, base + TWIN: calls[base] if twin is None else twin}
    for _ in range(TRIES):
        times = interleaved(with_twin, blocks=blocks, calls_a_block=calls_a_block, rng=rng)
        found = compare(times, base=base, twin=base + TWIN, rng=rng)
        if found.valid:
            break
    return found, times


def environment() -> dict[str, Any]:
    """What the figures depend on, without the machine's name."""
    return {
        "kind": "measured",
        "commit": _commit(),
        "processor": _processor(),
        "processors_allowed": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def write_results(name: str, figures: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **figures}, indent=2) + "\n", encoding="utf-8")
    return path


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _commit() -> str:
    """What is checked out, and whether the sources were changed since; empty outside a clone."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
