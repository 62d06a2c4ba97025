"""What tests of every kind share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.effort import effort

# OpenMP's waiting threads spin: with as many of them in each worker process as there are processors, two workers
# that train at the same time took ten times as long. Child processes inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hypothesis would fail an example that takes 200 ms, which a loaded machine makes of any. Not every device has it.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # Nor is it a fault of a test that what it draws was slow to come.
    settings.register_profile(
        "outrider", deadline=None, max_examples=effort(100), suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("outrider")

DemoCli = Callable[..., subprocess.CompletedProcess[str]]
# `outrider demo` for which no machine is too slow: how late its answers are is for a quiet one to say.
PATIENT = """
import sys
from outrider.cli import main
from outrider_exporters.demo import processes, run, stream
run.DEADLINE_MS = stream.DEADLINE_MS = 60_000.0
stream.FLUSH_S = processes.START_LIMIT_S = processes.STOP_LIMIT_S = 200.0
sys.exit(main())
"""


@pytest.fixture(scope="session")
def demo_cli() -> DemoCli:
    """`outrider demo` in a process of its own."""

    def run(*args: str | Path, patient: bool = False) -> subprocess.CompletedProcess[str]:
        program = ["-c", PATIENT] if patient else ["-m", "outrider.cli"]
        command = [sys.executable, *program, "demo", "--json", *map(str, args)]
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
            result = demo_cli("--stream", "5000", "--rate", "250", "--output", shared / "demo", patient=True)
            assert result.returncode == 0, result.stderr
            told.write_text(result.stdout)
    parsed: dict[str, Any] = json.loads(told.read_text())
    return parsed
