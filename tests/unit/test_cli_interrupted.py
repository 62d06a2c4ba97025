"""Ctrl-C while a command is still importing what it needs: no traceback, and the shell's exit code for it.

A module of that name stands first on the path and sends SIGINT to its own process while it is being imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background leaves it ignored
print("importing", __name__, flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("imported", __name__, flush=True)
"""
SCRIPT = ["-c", "import sys; from outrider.cli import main; sys.exit(main())"]  # as pip writes it


@pytest.mark.parametrize(
    "command", [SCRIPT, ["-m", "outrider"], ["-m", "outrider.cli"]], ids=["script", "-m", "-m cli"]
)
@pytest.mark.parametrize("module", ["numpy", "argparse"])
def test_an_interrupt_while_a_command_imports_ends_it_quietly(tmp_path: Path, command: list[str], module: str) -> None:
    (tmp_path / f"{module}.py").write_text(STAND_IN)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]  # a device's tests find outrider by it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *command, "doctor"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"importing {module}\n"
    assert done.stderr == "error: interrupted\n"
    assert done.returncode == 130
