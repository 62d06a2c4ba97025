"""`outrider doctor` beside a real broker and a real endpoint, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.broker import Mosquitto
from support.endpoint_child import Child, write_models
from support.ports import free_port

pytestmark = pytest.mark.slow


def run(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outrider.cli", "doctor", *args]
    env = {**os.environ, "STATE_DIRECTORY": str(state)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert "Traceback" not in done.stderr
    return done


def checks(state: Path, *args: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by name."""
    done = run(state, *args, "--json")
    told = json.loads(done.stdout)
    assert told["healthy"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in told["checks"]}


def test_a_broker_and_an_endpoint_that_answer(tmp_path: Path) -> None:
    write_models(tmp_path)
    child = Child(tmp_path)
    try:
        with Mosquitto(tmp_path / "broker") as broker:
            url = f"mqtt://127.0.0.1:{broker.port}"
            code, found = checks(tmp_path / "state", "--broker", url, "--endpoint", f"{child.url}/linear")
            assert code == 0
            assert found["broker"]["found"] == f"{url} answers"
            assert "serves linear" in found["endpoint"]["found"]
        text = run(tmp_path / "state", "--endpoint", child.url)
        assert text.returncode == 0
        assert f"{child.url} is ready" in text.stdout
        code, found = checks(tmp_path / "state", "--endpoint", f"{child.url}/nothing")
        assert (code, found["endpoint"]["status"]) == (1, "broken")
    finally:
        child.stop()


def test_a_broker_and_an_endpoint_that_are_not_there(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    text = run(tmp_path / "state", "--broker", f"mqtt://{nobody}", "--endpoint", f"http://{nobody}/linear")
    assert text.returncode == 1
    broken = [line for line in text.stdout.splitlines() if line.startswith("broken")]
    assert [line.split()[1] for line in broken] == ["broker", "endpoint"]
    assert text.stdout.count("refused") == 2
    assert "cure: check address, model and token" in text.stdout
