"""What tests of every kind share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DemoCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def demo_cli() -> DemoCli:
    """`outrider demo` in a process of its own."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "outrider.cli", "demo", "--json", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def demo_run(demo_cli: DemoCli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one whole demo, from nothing."""
    result = demo_cli("--stream", "5000", "--rate", "250", "--output", tmp_path_factory.mktemp("demo"))
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed
