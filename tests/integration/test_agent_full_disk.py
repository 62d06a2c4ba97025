"""What an agent does on a disk that is full: at its start, and at a reload that moves its reports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AgentProcess, Home, command
from support.broker import Mosquitto, wait_until
from support.tmpfs import fill, small_disk

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """On a small disk; what is read and written as answers is elsewhere."""
    with Mosquitto(tmp_path / "mosquitto") as broker, small_disk(tmp_path / "disk", size_kib=20_000) as disk:
        (disk / "home").mkdir()
        home = Home(disk / "home", broker.url)
        home.inbox = tmp_path / "inbox"
        home.inbox.mkdir()
        home.answers_path = tmp_path / "answers.jsonl"
        configure(home)
        yield home


def configure(home: Home, *, broker: str = "") -> None:
    source = f'kind = "folder"\npath = "{home.inbox}"\nsettle_s = 0\npoll_s = 0.05'
    home.configure(source=source, broker=broker)
    text = home.config.read_text().replace('file = "answers.jsonl"', f'file = "{home.answers_path}"')
    home.config.write_text(text)


def test_a_disk_that_is_full_at_the_start_stops_no_answer_and_reports_follow(home: Home) -> None:
    with AgentProcess(home) as first:
        home.put("first", 1)
        home.outputs("first")
        first.kill()
    ballast = fill(home.folder)
    with AgentProcess(home) as agent:
        home.put("second", 2)
        home.outputs("second")
        ballast.unlink()
        assert command(home, "stats")["data"]["answered"] >= 1
        account = agent.stop()["account"]
        assert (account["lost"], account["enqueued"] > 0) == (0, True)


def test_a_reload_that_moves_the_reports_on_a_full_disk_recovers_by_itself(home: Home) -> None:
    with AgentProcess(home) as agent:
        home.put("first", 1)
        home.outputs("first")
        configure(home, broker="sample = 0.5")
        ballast = fill(home.folder)
        agent.send(signal.SIGHUP)
        agent.wait_for("reloaded")
        home.put("second", 2)
        home.outputs("second")
        ballast.unlink()
        assert command(home, "ping")["result"] == "ok"
        wait_until(lambda: command(home, "stats")["data"]["account"]["enqueued"] > 0)
        assert agent.stop()["account"]["lost"] == 0
