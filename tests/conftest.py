"""What tests of every kind share."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# OpenMP's waiting threads spin: with as many of them in each worker process as there are processors, two workers
# that train at the same time took ten times as long. Child processes inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DemoCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def demo_cli() -> DemoCli:
    """`outrider demo` in a process of its own."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "outrider.cli", "demo", "--json", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture(scope="session")
def demo_run(demo_cli: DemoCli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one whole demo, from nothing; one for all worker processes of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    told = shared / "demo.json"
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.is_file():
            result = demo_cli("--stream", "5000", "--rate", "250", "--output", shared / "demo")
            assert result.returncode == 0, result.stderr
            told.write_text(result.stdout)
    parsed: dict[str, Any] = json.loads(told.read_text())
    return parsed
