"""The agent as the unit of docs/agent.md under a real systemd: ready, answering, reloaded, killed by the watchdog and
started again, stopped, and stopped while a call hangs. The unit is taken as it stands."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.agent.sources.folder import MOST_DEATHS
from support import tinymodels
from support.broker import wait_until
from support.mutants import write_results
from support.realbundles import expected, images, make_real_bundle
from support.systemd import LIBRARIES, UNITS, USER_ID, Board

pytestmark = [pytest.mark.slow, pytest.mark.trials, pytest.mark.timeout(600)]

UNIT = "outrider-agent.service"
FILE = Path(__file__).parents[2] / "firmware_examples" / "raspberry_pi" / UNIT
STATE = "var/lib/outrider"
ANGRY = np.full((1, 8, 8), 6.0, np.float32)  # makes the model count to 2^62
CONFIG = """
device = "pi-07"

[model]
bundle = "tiny.outrider"

[source]
kind = "folder"
path = "/var/lib/outrider/inbox"
settle_s = 0
poll_s = 0.05

[output]
file = "/var/lib/outrider/answers.jsonl"
values = "{values}"

[broker]
url = "mqtt://127.0.0.1:1883"
"""


class AgentBoard(Board):
    """A board on which the agent is installed as the page says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.write(UNITS / UNIT, FILE.read_text(encoding="utf-8"))
        # There is no journal in it, and a Python that is taken out of its place may not find its own library.
        lines = ("[Service]", "StandardError=append:/run/agent.log", f"Environment=LD_LIBRARY_PATH={LIBRARIES}", "")
        self.write(UNITS / f"{UNIT}.d/trial.conf", "\n".join(lines))
        self.write("etc/outrider/agent.toml", CONFIG.format(values="summary"))
        endless = tinymodels.endless_onnx(tinymodels.weights(0), above=5.0)
        make_real_bundle(self.files / "etc/outrider/tiny.outrider", files={"onnx": endless})
        (self.files / STATE / "inbox").mkdir(parents=True)
        for path in (self.files / STATE, self.files / STATE / "inbox"):
            os.chown(path, USER_ID, USER_ID)

    def configure(self, text: str) -> None:
        """Another configuration, in the machine that runs."""
        (self.root / "etc/outrider/agent.toml").write_text(text)

    def put(self, name: str, image: np.ndarray) -> Path:
        """An input, whole at once."""
        inbox = self.root / STATE / "inbox"
        with (inbox / f".{name}").open("wb") as file:
            np.save(file, image)
        return (inbox / f".{name}").rename(inbox / f"{name}.npy")

    def answer(self, name: str, seed: int) -> dict[str, Any]:
        """The line of the answer to an image that is put there now."""
        self.put(name, images(1, seed)[0])

        def lines() -> list[dict[str, Any]]:
            with contextlib.suppress(FileNotFoundError):
                text = (self.root / STATE / "answers.jsonl").read_text()
                return [line for line in map(json.loads, text.splitlines()) if line["name"] == f"{name}.npy"]
            return []

        wait_until(lines, what=f"an answer to {name}; {self.said()[-3:]}")
        (line,) = lines()
        return line

    def said(self) -> list[dict[str, Any]]:
        """The agent's log."""
        text = (self.root / "run/agent.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def events(self) -> list[str]:
        return [str(line["event"]) for line in self.said()]

    def now(self) -> dict[str, str]:
        """What systemd says of the service."""
        names = ("ActiveState", "SubState", "Result", "MainPID", "NRestarts", "ExecMainStatus", "ExecMainCode")
        return self.shown(UNIT, *names)

    def computed_s(self) -> float:
        """Seconds that its process has had of the processor."""
        stat = (self.root / "proc" / self.now()["MainPID"] / "stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def timed(self, verb: str) -> float:
        """Seconds that ``systemctl VERB`` of the service took."""
        begun_s = time.monotonic()
        self.systemctl(verb, UNIT)
        return round(time.monotonic() - begun_s, 2)


def is_right(line: dict[str, Any], seed: int) -> bool:
    return bool(np.allclose(line["outputs"]["logits"], expected(images(1, seed)), atol=1e-3))


def started(board: AgentBoard) -> dict[str, Any]:
    """It is active when it said so, not before; as the user and with the rights of the unit."""
    taken_s = board.timed("start")
    now = board.now()
    assert (now["ActiveState"], now["SubState"], now["NRestarts"]) == ("active", "running", "0")
    assert "ready" in board.events()
    assert is_right(board.answer("first", 1), 1)
    status = (board.root / "proc" / now["MainPID"] / "status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(USER_ID)] * 4
    assert (int(fields["CapEff"], 16), fields["NoNewPrivs"], fields["Seccomp"]) == (0, "1", "2")
    assert (board.root / STATE).stat().st_mode & 0o777 == 0o700
    return {"start_s": taken_s}


def reloaded(board: AgentBoard) -> dict[str, Any]:
    """Another configuration holds in the same process; one that cannot be used changes nothing."""
    pid = board.now()["MainPID"]
    board.configure(CONFIG.format(values="none"))
    taken_s = board.timed("reload")
    wait_until(lambda: "reloaded" in board.events(), what="reloaded")
    wait_until(lambda: board.now()["ActiveState"] == "active", what="active again")
    assert "outputs" not in board.answer("reloaded", 2)
    board.configure("device = ")
    board.systemctl("reload", UNIT)
    wait_until(lambda: "reload_refused" in board.events(), what="refused")
    wait_until(lambda: board.now()["ActiveState"] == "active", what="active again")
    assert "outputs" not in board.answer("refused", 3)
    assert board.now()["MainPID"] == pid
    board.configure(CONFIG.format(values="summary"))
    return {"reload_s": taken_s}


def killed(board: AgentBoard) -> dict[str, Any]:
    """A call that hangs: the watchdog kills the agent, which starts again; after two kills that input is left out."""
    pid, seconds = board.now()["MainPID"], []
    board.put("angry", ANGRY)
    for restart in range(1, MOST_DEATHS + 1):
        begun_s = time.monotonic()
        wait_until(lambda: board.now()["SubState"] == "auto-restart", timeout_s=120, what="the watchdog's kill")
        seconds.append(round(time.monotonic() - begun_s, 2))
        assert board.now()["Result"] == "watchdog"
        wait_until(lambda: board.now()["SubState"] == "running", timeout_s=60, what="started again")
        now = board.now()
        assert now["NRestarts"] == str(restart) and now["MainPID"] != pid
    assert is_right(board.answer("again", 4), 4)
    (refused,) = [line for line in board.said() if line["event"] == "frame_refused"]
    assert refused["frame"] == "angry.npy" and "it is left out" in refused["error"]
    return {"watchdog_kill_s": seconds, "restarts": MOST_DEATHS}


def stopped(board: AgentBoard) -> dict[str, Any]:
    """A stop that has nothing to wait for is a success."""
    taken_s = board.timed("stop")
    now = board.now()
    assert (now["ActiveState"], now["Result"], now["ExecMainStatus"]) == ("inactive", "success", "0")
    last = board.said()[-1]
    assert (last["event"], last["ended"]) == ("ended", "SIGTERM")
    assert last["account"]["lost"] == 0 and last["account"]["pending"] == last["account"]["enqueued"]
    return {"stop_s": taken_s, "enqueued": last["account"]["enqueued"]}


def stopped_in_a_call(board: AgentBoard) -> dict[str, Any]:
    """A stop while a call hangs ends by the agent's own bound, before systemd kills it."""
    board.systemctl("start", UNIT)
    before_s = board.computed_s()
    board.put("angry-again", ANGRY)
    wait_until(lambda: board.computed_s() > before_s + 1.0, timeout_s=60, what="the call that counts on and on")
    taken_s = board.timed("stop")
    now = board.now()
    assert (now["ActiveState"], now["Result"], now["ExecMainStatus"]) == ("failed", "exit-code", "1")
    assert board.said()[-1]["event"] == "stop_overdue"
    return {"stop_in_a_call_s": taken_s}


def test_the_unit_of_the_page_under_a_real_systemd(tmp_path: Path) -> None:
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "board").mkdir()
    begun_s = time.monotonic()
    with AgentBoard(tmp_path / "board") as board:
        seen = {**started(board), **reloaded(board), **killed(board), **stopped(board), **stopped_in_a_call(board)}
    taken_s = round(time.monotonic() - begun_s, 1)
    write_results("agent-systemd", {"systemd": version.splitlines()[0], **seen, "taken_s": taken_s})
