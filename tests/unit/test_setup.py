"""The check that keeps an unasked-for CUDA build out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / ".ci" / "is_cuda_build.py"


@pytest.mark.parametrize(
    ("version", "needs", "code"),
    [
        ("2.13.0", ["sympy", "nvidia-cublas==13.1; platform_system == 'Linux'"], 1),
        ("2.13.0", ["cuda-toolkit[cublas]==13.0", "sympy"], 1),
        ("2.13.0", ["triton==3.7.0"], 1),
        ("2.13.0", ["sympy", "jinja2"], 0),
        ("2.13.0+cpu", ["sympy", "jinja2"], 0),
    ],
)
def test_a_build_that_brings_cuda_is_seen(tmp_path: Path, version: str, needs: list[str], code: int) -> None:
    report = tmp_path / "report.json"
    metadata = {"name": "torch", "version": version, "requires_dist": needs}
    report.write_text(json.dumps({"install": [{"metadata": metadata}]}))
    assert subprocess.run([sys.executable, str(CHECK), str(report)]).returncode == code
