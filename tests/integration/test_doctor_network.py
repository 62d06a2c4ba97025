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
from support.certificates import issue
from support.endpoint_child import Child, write_models
from support.ports import free_port

pytestmark = pytest.mark.slow


PATIENT = """
import sys
from outrider import doctor
from outrider.cli import main
doctor.NETWORK_MS = 120_000.0
sys.exit(main())
"""


def run(state: Path, *args: str, answers: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    """``answers``: what is asked does, for as long as a stalled machine may take."""
    command = [sys.executable, *(["-c", PATIENT] if answers else ["-m", "outrider.cli"]), "doctor", *args]
    env = {**os.environ, "STATE_DIRECTORY": str(state), **environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    assert "Traceback" not in done.stderr
    return done


def checks(state: Path, *args: str, answers: bool = False, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by name."""
    done = run(state, *args, "--json", answers=answers, **environ)
    told = json.loads(done.stdout)
    assert told["healthy"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in told["checks"]}


def test_a_broker_and_an_endpoint_that_answer(tmp_path: Path) -> None:
    write_models(tmp_path)
    child = Child(tmp_path)
    try:
        with Mosquitto(tmp_path / "broker") as broker:
            url = f"mqtt://127.0.0.1:{broker.port}"
            asked = ("--broker", url, "--endpoint", f"{child.url}/linear")
            code, found = checks(tmp_path / "state", *asked, answers=True)
            assert code == 0
            assert found["broker"]["found"] == f"{url} answers"
            assert "serves linear" in found["endpoint"]["found"]
        text = run(tmp_path / "state", "--endpoint", child.url, answers=True)
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


def test_a_broker_that_asks_who_it_is(tmp_path: Path) -> None:
    passwords, issued = tmp_path / "passwords", issue(tmp_path)
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "pi", "right"], check=True, capture_output=True)
    port = free_port()
    guarded = (
        f"listener {port} 127.0.0.1\ncertfile {issued.certificate}\nkeyfile {issued.key}\npassword_file {passwords}\n"
    )
    asked = ("--broker", f"mqtts://localhost:{port}", "--ca", str(issued.certificate), "--user", "pi")
    with Mosquitto(tmp_path / "broker", extra=guarded):
        code, found = checks(tmp_path / "state", *asked, answers=True, OUTRIDER_MQTT_PASSWORD="right")
        assert (code, found["broker"]["status"]) == (0, "ok")
        code, found = checks(tmp_path / "state", *asked, OUTRIDER_MQTT_PASSWORD="wrong")
        while "no answer" in found["broker"]["cause"]:  # on a stalled machine
            code, found = checks(tmp_path / "state", *asked, OUTRIDER_MQTT_PASSWORD="wrong")
        assert (code, found["broker"]["status"]) == (1, "broken")
        assert "Not authorized" in found["broker"]["cause"] and "wrong" not in str(found)


def test_a_password_in_the_environment_is_no_matter_without_a_broker(tmp_path: Path) -> None:
    assert run(tmp_path / "state", OUTRIDER_MQTT_PASSWORD="secret").returncode == 0
    refused = run(tmp_path / "state", "--broker", "mqtt://127.0.0.1:1", OUTRIDER_MQTT_PASSWORD="secret")
    assert refused.returncode == 1 and "--user" in refused.stderr and "secret" not in refused.stderr
