"""The README's Python blocks run as they stand, one after the other; its figures are the committed ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import readme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_blocks_run_in_order(tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        result = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "STATE_DIRECTORY": str(tmp_path / "state")},
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout
    assert "edge" in result.stdout


def test_the_two_commands_stand_at_the_top() -> None:
    first = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert first.group(1).split("\n")[:2] == ["make demo", "make test"]
    assert README.index(first.group(0)) < 400


def test_the_figures_come_from_the_committed_results() -> None:
    assert readme.replaced(README, readme.figures()) == README
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_command_that_it_names_exists() -> None:
    named = re.search(r"example for each of `([^`]*)`", README)
    assert named is not None
    out = subprocess.run([sys.executable, "-m", "outrider.cli", "--help"], capture_output=True, text=True).stdout
    for command in named.group(1).split():
        assert re.search(rf"^ +{command} ", out, re.MULTILINE), command
