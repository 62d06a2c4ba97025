"""`outrider watch` as people and programs run it, at a real broker."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry import Limits, Reporter
from outrider.watch import Watch
from support.broker import Mosquitto, wait_until
from support.fleet import Simulated, a_story
from support.listener import Listener
from support.telemetry import Source

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "outrider.cli", "watch"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def device(broker: Mosquitto) -> Iterator[Listener]:
    with Listener(broker.port, "nothing") as client:
        yield client


def tell(device: Listener, *messages: Any) -> None:
    for message in messages:
        device.say(message.topic, message.payload, retain=message.retain)


def page_of(child: subprocess.Popen[str]) -> str:
    assert child.stderr is not None
    found = re.search(r"http://\S+", child.stderr.readline())
    assert found
    return found[0]


def devices_of(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}fleet.json", timeout=120) as answer:
        devices: list[dict[str, Any]] = json.load(answer)["devices"]
    return devices


def test_json_is_one_object_when_it_is_stopped(broker: Mosquitto, device: Listener) -> None:
    tell(device, *a_story(until_s=time.time(), minutes=2))
    command = [*COMMAND, broker.url, "--json", "--html", "0", "--sort", "state"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        url = page_of(child)
        wait_until(lambda: len(devices_of(url)) == 8, what="what the broker kept")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    told = json.loads(out)
    assert told["connected"] and told["broker"] == broker.url and told["url"] == url
    first = told["devices"][0]
    assert (first["device"], first["state"], first["model"]) == ("gate-south", "offline", "digits")


def test_lines_where_there_is_no_terminal(broker: Mosquitto, device: Listener) -> None:
    pi = Simulated("pi-07")
    with subprocess.Popen([*COMMAND, broker.url, "--html", "0"], stdout=-1, stderr=-1, text=True) as child:
        url = page_of(child)
        assert child.stdout is not None
        tell(device, pi.status())
        assert re.fullmatch(r"\d\d:\d\d:\d\d  pi-07  online \(connected\)\n", child.stdout.readline())
        tell(device, pi.info(), pi.metrics([2.0] * 10), pi.event("rollback", reason="slow"))
        lines = [child.stdout.readline().split("  ", 2)[2].strip() for _ in range(3)]
        assert lines == ["serves digits 3, onnx-int8", "10 answers, p95 2.089 ms", "rollback reason=slow"]
        assert devices_of(url)[0]["state"] == "online"
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    assert out.startswith("1 device: 1 online") and "pi-07" in out.splitlines()[-1]


def test_what_a_terminal_has_no_letters_for_is_a_question_mark(broker: Mosquitto, device: Listener) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    line = [*COMMAND, broker.url, "--html", "0"]
    with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=environ) as child:
        page_of(child)
        assert child.stdout is not None
        pi = Simulated("pi-07")
        tell(device, pi.status())  # which is kept for who subscribes later
        assert child.stdout.readline().endswith("  pi-07  online (connected)\n")
        tell(device, pi.event("rollback", reason="zu groß \u2713"))
        assert child.stdout.readline().endswith("  pi-07  rollback reason=zu gro? ?\n")
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=200)
    assert child.returncode == 0 and "zu gro? ?" in out, err


def test_a_reader_that_hangs_up_ends_it(broker: Mosquitto, device: Listener) -> None:
    pi = Simulated("pi-07")
    with subprocess.Popen([*COMMAND, broker.url], stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        tell(device, pi.status())
        assert "pi-07" in child.stdout.readline()
        child.stdout.close()
        tell(device, pi.event("one more line"))
        assert child.wait(200) == 1
        assert "Traceback" not in child.stderr.read()


def read_until(terminal: int, pattern: bytes) -> bytes:
    seen = b""
    until = time.monotonic() + 200.0
    while not re.search(pattern, seen, re.DOTALL):
        assert select.select([terminal], [], [], max(0.0, until - time.monotonic()))[0], seen
        seen += os.read(terminal, 65536)
    return seen


def test_a_table_that_is_painted_again_where_there_is_a_terminal(broker: Mosquitto, device: Listener) -> None:
    pi = Simulated("pi-07")
    tell(device, pi.status(), pi.info())
    here, there = pty.openpty()
    child = subprocess.Popen([*COMMAND, broker.url], stdout=there, env={**os.environ, "COLUMNS": "200", "LINES": "30"})
    os.close(there)
    try:
        seen = read_until(here, b"digits 3")
        assert seen.startswith(b"\x1b[?1049h") and b"\x1b[32monline" in seen
        tell(device, pi.status("offline", reason="lost"))
        read_until(here, rb"\x1b\[31moffline")
        child.send_signal(signal.SIGINT)
        read_until(here, rb"\x1b\[\?1049l.*1 offline.*pi-07")
        assert child.wait(200) == 0
    finally:
        child.kill()
        child.wait(200)
        os.close(here)


def test_what_is_logged_is_not_written_over_the_table() -> None:
    here, there = pty.openpty()
    size = {"COLUMNS": "200", "LINES": "30"}
    child = subprocess.Popen([*COMMAND, "mqtt://127.0.0.1:1"], stdout=there, stderr=there, env={**os.environ, **size})
    os.close(there)
    try:
        seen = read_until(here, rb"cannot connect[^\n]*\x1b\[K")  # the head of the table says it
        child.send_signal(signal.SIGTERM)
        seen += read_until(here, rb"\x1b\[\?1049l")
        assert b"next attempt" not in seen.partition(b"\x1b[?1049l")[0]
        assert child.wait(200) == 0
    finally:
        child.kill()
        child.wait(200)
        os.close(here)


def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environ}
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=200, env=env)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("mqtt://127.0.0.1:1", "--once", "--seconds", "0.5"), "mqtt://127.0.0.1:1: "),
        (("http://127.0.0.1",), "is not of the form"),
        (("mqtts://127.0.0.1", "--ca", "nowhere.pem"), "nowhere.pem"),
    ],
)
def test_what_cannot_be_done_is_named(args: tuple[str, ...], said: str) -> None:
    done = run(*args)
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr


def test_wrong_usage() -> None:
    for args in (
        ("mqtt://127.0.0.1:1", "--html", "99999"),
        ("mqtt://127.0.0.1:1", "--seconds", "0"),
        ("mqtt://127.0.0.1:1", "--sort", "luck"),
        (),
    ):
        assert run(*args).returncode == 2


def test_a_password_without_a_name_is_refused() -> None:
    done = run("mqtt://127.0.0.1:1", "--once", OUTRIDER_MQTT_PASSWORD="secret")
    assert done.returncode == 1 and "--user" in done.stderr and "secret" not in done.stderr


def test_an_onlooker_takes_nothing_and_counts_once(broker: Mosquitto, tmp_path: Path) -> None:
    source = Source()
    limits = Limits(receipt_timeout_s=0.2)
    with Listener(broker.port, "outrider/#") as others, Watch(broker.url) as watch:
        wait_until(lambda: watch.connected, what="the watch is connected")
        with Reporter(
            broker.url, device="pi-07", state=tmp_path, commit_interval_ms=20.0, limits=limits, metrics_interval_s=None
        ) as reporter:
            reporter.watch(source)
            source.predict(30, start=1)
            wait_until(lambda: sum(row.records for row in watch.rows()) == 30, what="all seen")
            batches = len(others.on("outrider/v1/pi-07/records"))
            wait_until(lambda: len(others.on("outrider/v1/pi-07/records")) >= batches + 2, what="sent again")
            (row,) = watch.rows()
            assert (row.records, row.told.predictions, row.gaps) == (30, 30, 0)
            account = reporter.account()
            assert (account.delivered, account.pending) == (0, account.enqueued)
    assert {seen.topic.rpartition("/")[2] for seen in others.heard} == {"status", "info", "records"}
