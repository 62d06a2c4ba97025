"""The agent's example: its configuration as it stands, its unit as systemd reads it, and what the README says of it."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.agent.config import load_config
from outrider.policy import Policy
from outrider.telemetry import Sink
from support.agents import AgentProcess, Home, command
from support.broker import Mosquitto, wait_until
from support.realbundles import expected, images, make_real_bundle

EXAMPLE = Path(__file__).parents[2] / "firmware_examples" / "raspberry_pi"
UNIT = EXAMPLE / "outrider-agent.service"
ROWS = 5

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


class ExampleHome(Home):
    """A folder with the example's configuration; only the broker's and the cloud's addresses are this machine's."""

    def configure(self, **_: str) -> None:  # type: ignore[override]
        make_real_bundle(self.folder / "digits.outrider", name="digits")
        text = (EXAMPLE / "agent.toml").read_text(encoding="utf-8")
        text = text.replace("mqtt://192.0.2.10:1883", self.broker_url).replace("192.0.2.10:8000", "127.0.0.1:9")
        text = text.replace("deadline_ms = 100.0", "deadline_ms = 60000.0")  # this machine may be busy
        self.config.write_text(text, encoding="utf-8")


def test_the_configuration_says_what_it_shows() -> None:
    config = load_config(EXAMPLE / "agent.toml")
    assert config.policy == Policy(deadline_ms=100.0, min_margin=0.5)
    assert config.model.bundle == str(EXAMPLE / "digits.outrider")
    assert config.commands.bundles == EXAMPLE / "bundles"


def test_it_answers_and_reports_and_keeps_its_state_where_systemd_says(tmp_path: Path, broker: Mosquitto) -> None:
    (tmp_path / "home").mkdir()
    home = ExampleHome(tmp_path / "home", broker.url)
    environ = {"STATE_DIRECTORY": str(home.state)}
    with Sink(broker.url) as sink, AgentProcess(home, environ=environ) as agent:
        for row in range(ROWS):
            home.put(str(row), row)
        for row in range(ROWS):
            assert np.allclose(home.outputs(str(row)), expected(images(1, row)), atol=1e-3)
        said = command(home, "pause", key=home.key, code=1)
        assert said["reason"] == "no_keys"
        outcome = agent.stop()
        wait_until(lambda: sink.count().received >= outcome["account"]["enqueued"])
    assert outcome["answered"] == ROWS
    assert (home.state / "agent" / "pi-07" / "commands.json").exists() is False, "no command was taken"
    assert (home.state / "telemetry" / "pi-07.sqlite").exists()


class PageHome(Home):
    """A folder with the configuration of docs/agent.md, pasted: no broker is at the address that it names."""

    def configure(self, **_: str) -> None:  # type: ignore[override]
        make_real_bundle(self.folder / "digits.outrider", name="digits")
        page = (EXAMPLE.parents[1] / "docs" / "agent.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
        self.config.write_text(block, encoding="utf-8")


def test_the_pages_configuration_works_when_it_is_pasted(tmp_path: Path) -> None:
    home = PageHome(tmp_path, "mqtt://127.0.0.1:1883")
    page = (EXAMPLE.parents[1] / "docs" / "agent.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with AgentProcess(home) as agent:
        subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True, timeout=250)
        zeros = np.zeros((1, 1, 8, 8), np.float32)
        assert np.allclose(home.outputs("one"), expected(zeros), atol=1e-3)
        account = agent.stop()["account"]
    assert account["enqueued"] == account["pending"] > 0
    assert (home.state / "bundles").stat().st_mode & 0o777 == 0o700, "where the page has one copy bundles to"


def test_the_unit_has_what_the_agent_speaks() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    service = dict(unit["Service"])
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 10
    assert (service["StateDirectory"], service["StateDirectoryMode"]) == ("outrider", "0700")
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["ExecStart"].endswith("outrider agent /etc/outrider/agent.toml")
    hardening = ("NoNewPrivileges", "ProtectSystem", "ProtectHome", "PrivateTmp", "RestrictNamespaces", "UMask")
    assert all(key in service for key in hardening)
    assert "ProtectClock" not in service, "the agent asks the kernel whether the clock is right"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:  # what can be said of it without is said by the test above
        return
    program = str(Path(sys.executable).with_name("outrider"))
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/outrider/venv/bin/outrider", program))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=250)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_the_readme_names_the_files_and_the_commands_that_there_are() -> None:
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for name in ("agent.toml", "outrider-agent.service", "device.py"):
        assert name in page
        assert (EXAMPLE / name).is_file()
    assert "outrider agent agent.toml" in page
