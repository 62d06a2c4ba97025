"""What is said to systemd, what is logged, counted and written."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.agent import logs
from outrider.agent.config import OutputConfig
from outrider.agent.counting import QUIET_S, Counts
from outrider.agent.ending import Bound
from outrider.agent.notify import Notifier
from outrider.agent.outputs import AnswerWriter, plain
from outrider.prediction import Prediction
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.runner import Timing
from support.realbundles import INTERFACE


class Manager:
    """The service manager's end: a datagram socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)

    def heard(self) -> str:
        return self.socket.recv(4096).decode()

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_what_is_said(tmp_path: Path, abstract: bool) -> None:
    address = f"\0outrider-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = Manager(address)
    notifier = Notifier({"NOTIFY_SOCKET": address.replace("\0", "@")}, clock=lambda: 12.5)
    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    assert manager.heard() == "READY=1"
    assert manager.heard() == "RELOADING=1\nMONOTONIC_USEC=12500000"
    assert manager.heard() == "STOPPING=1"
    manager.close()
    notifier.ready()  # nobody is there any more: no failure


def test_the_watchdog_is_fed_when_it_is_time_and_only_then(tmp_path: Path) -> None:
    times = iter((0.0, 0.0, 0.5, 1.9, 2.0, 2.0, 2.1, 3.9, 4.5, 4.5))  # it is asked once more when it says something
    manager = Manager(str(tmp_path / "notify"))
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(environ, clock=lambda: next(times))
    assert notifier.alive_every_s == 2.0
    for _ in range(7):
        notifier.alive()
    manager.socket.setblocking(False)
    assert [manager.heard() for _ in range(3)] == ["WATCHDOG=1"] * 3
    with pytest.raises(BlockingIOError):
        manager.heard()
    manager.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "many"},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
def test_where_nobody_watches_nothing_is_said(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    assert notifier.alive_every_s is None
    notifier.alive()
    notifier.say("STATUS=x")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, logging_as_before: None) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.start("info")
    return stream


def test_a_log_is_one_json_object_a_line(logged: io.StringIO) -> None:
    logs.say("ready", device="pi-07", path=Path("/x"))
    logs.say("hidden", level=logging.DEBUG)
    logging.getLogger("outrider.telemetry").warning("two\nlines %s", 7)
    logging.getLogger("elsewhere").info("not ours")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("elsewhere").exception("failed")
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["ready", "log", "log"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("at")) for line in lines)
    assert lines[0] == {"level": "info", "event": "ready", "device": "pi-07", "path": "/x"}
    assert lines[1]["message"] == "two\nlines 7" and lines[1]["logger"] == "outrider.telemetry"
    assert "ValueError: why" in lines[2]["traceback"]


def test_what_python_says_itself_is_json_too(logged: io.StringIO) -> None:
    warnings.showwarning("old\nway", DeprecationWarning, "there.py", 7)
    thread = threading.Thread(target=lambda: {}["why"], name="outrider-x")
    thread.start()
    thread.join()
    warned, died = (json.loads(line) for line in logged.getvalue().splitlines())
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")
    assert "there.py:7: DeprecationWarning: old\nway" in warned["message"]
    assert died["message"] == "thread outrider-x died" and "KeyError: 'why'" in died["traceback"]


def test_a_flood_of_one_failure_is_a_line_a_minute() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    assert counts.fail("refused", "ShapeError") == 1
    assert [counts.fail("refused", "ShapeError") for _ in range(5)] == [None] * 5
    assert counts.fail("failed", "ShapeError") == 1
    now = QUIET_S
    assert counts.fail("refused", "ShapeError") == 6
    assert counts.to_dict() == {
        "frames": 0,
        "answered": 0,
        "refused": {"ShapeError": 7},
        "failed": {"ShapeError": 1},
    }


def a_prediction(outputs: dict[str, np.ndarray]) -> Prediction:
    return Prediction(
        outputs=outputs,
        variant="v",
        engine="e",
        bundle="ab",
        verified=True,
        timing_ms=Timing(infer=1.0, total=1.25),
    )


LOGITS = np.eye(2, 10, 3, dtype=np.float32)


@pytest.mark.parametrize("values", ["summary", "all", "none"])
def test_an_answer_is_a_line(tmp_path: Path, values: str) -> None:
    path = tmp_path / "answers.jsonl"
    writer = AnswerWriter(OutputConfig(file=str(path), values=values), wall=lambda: 5.5)
    big = np.zeros((1, 100), np.float32)
    writer.write("a.npy", a_prediction({"logits": LOGITS, "big": big}), INTERFACE)
    writer.close()
    line = json.loads(path.read_text())
    assert line.pop("labels") == ["3", "4"]
    outputs = {
        "summary": {"logits": LOGITS.tolist(), "big": {"dtype": "float32", "shape": [1, 100]}},
        "all": {"logits": LOGITS.tolist(), "big": big.tolist()},
        "none": None,
    }[values]
    assert line.pop("outputs", None) == outputs
    assert line == {
        "at_s": 5.5,
        "name": "a.npy",
        "source": "edge",
        "reason": "local",
        "variant": "v",
        "total_ms": 1.25,
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert plain(np.float32([[1.0, np.nan], [np.inf, -2.0]])) == [[1.0, None], [None, -2.0]]
    assert plain(np.int8([1])) == [1]


def test_the_file_of_answers_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    writer = AnswerWriter(OutputConfig(file=str(path), max_bytes=4096))
    for number in range(100):
        writer.write(str(number), a_prediction({"logits": LOGITS}), INTERFACE)
    writer.close()
    sizes = [each.stat().st_size for each in sorted(tmp_path.iterdir())]
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["answers.jsonl", "answers.jsonl.1"]
    assert max(sizes) < 4096 + 600
    last = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert not last or last[-1] == "99"


def test_a_file_that_cannot_be_opened_anew_when_it_is_full_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "answers.jsonl"
    path.parent.mkdir()
    writer = AnswerWriter(OutputConfig(file=str(path), max_bytes=1))
    path.parent.rename(tmp_path / "away")
    for _ in range(3):
        writer.write("lost", a_prediction({"logits": LOGITS}), INTERFACE)
    assert writer.lost == 3
    (tmp_path / "away").rename(path.parent)
    writer.write("kept", a_prediction({"logits": LOGITS}), INTERFACE)
    writer.close()
    assert writer.lost == 3
    written = [json.loads(line)["name"] for each in path.parent.iterdir() for line in each.read_text().splitlines()]
    assert written[-1] == "kept"


def test_a_file_that_cannot_be_written_is_an_error_at_the_start_and_a_count_later(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.file"):
        AnswerWriter(OutputConfig(file=str(tmp_path / "none" / "a.jsonl")))
    if Path("/dev/full").exists():
        writer = AnswerWriter(OutputConfig(file="/dev/full"))
        for _ in range(3):
            writer.write("x", a_prediction({"logits": LOGITS}), INTERFACE)
        assert writer.lost == 3


@pytest.fixture
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP do nothing here; both are handled in Python, as they are in an agent."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_who_is_told_to_stop_and_does_not_is_overdue_after_the_bound(stoppable: None) -> None:
    overdue = threading.Event()
    with Bound(0.0, overdue.set):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not overdue.wait(0.05), "that was no stop"
        os.kill(os.getpid(), signal.SIGTERM)
        assert overdue.wait(30)


@pytest.mark.parametrize("told", [True, False])
def test_who_ends_within_the_bound_is_not(stoppable: None, told: bool) -> None:
    overdue, before = threading.Event(), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    bound = Bound(3600.0, overdue.set)
    with bound:
        if told:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not bound._thread.is_alive() and not overdue.is_set()
    assert signal.set_wakeup_fd(before) == before, "as it was"
