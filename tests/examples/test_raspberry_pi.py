"""The Raspberry Pi program as a user starts it, against a real broker and a real endpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib

from outrider.telemetry.sink import Sink
from support.broker import Mosquitto, wait_until
from support.hybrids import EndpointProcess
from support.realbundles import expected, images, make_real_bundle

EXAMPLE = Path(__file__).parents[2] / "firmware_examples" / "raspberry_pi"
ROWS = 40


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    mosquitto = Mosquitto(tmp_path / "broker")
    mosquitto.start()
    yield mosquitto
    mosquitto.stop()


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[EndpointProcess]:
    bundle = tmp_path / "large.outrider"
    make_real_bundle(bundle, name="large", seed=1)
    process = EndpointProcess(bundle, model="large", state=tmp_path / "cloud")
    process.start()
    yield process
    process.stop()


def write_config(folder: Path, *, broker: str, endpoint: str, **input_: Any) -> Path:
    """The example's own config.toml with this test's places in it."""
    text = (EXAMPLE / "config.toml").read_text(encoding="utf-8")
    tomllib.loads(text)
    text = text.replace("http://192.0.2.10:8000", endpoint).replace("mqtt://192.0.2.10:1883", broker)
    text = text.replace('model = "digits-large"', 'model = "large"').replace("digits.outrider", "small.outrider")
    text = text.replace("deadline_ms = 100.0", "deadline_ms = 60000.0")  # this machine may be busy
    text = text.replace("flush_s = 10.0", f"flush_s = {input_.get('flush_s', 120.0)}")
    text = text.replace("rate_hz = 20.0", f"rate_hz = {input_.get('rate_hz', 500.0)}")
    text = text.replace("min_margin = 0.5", f"min_margin = {input_.get('min_margin', 0.5)}")
    (folder / "config.toml").write_text(f'state = "state"\n{text}', encoding="utf-8")
    make_real_bundle(folder / "small.outrider", name="small", seed=0)
    np.savez(folder / "stream.npz", image=images(input_.get("rows", ROWS)))
    return folder / "config.toml"


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE / "device.py"), "config.toml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(folder: Path) -> list[dict[str, Any]]:
    path = folder / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_the_program_is_short() -> None:
    assert len((EXAMPLE / "device.py").read_text(encoding="utf-8").splitlines()) < 80


def test_it_answers_every_row_and_reports_each(tmp_path: Path, broker: Mosquitto, endpoint: EndpointProcess) -> None:
    write_config(tmp_path, broker=broker.url, endpoint=endpoint.url)
    with Sink(broker.url) as sink:
        device = start(tmp_path)
        out, err = device.communicate(timeout=250)
        assert device.returncode == 0, err
        account = json.loads(out.splitlines()[-1])["account"]
        assert sink.count().received == ROWS
    assert account["enqueued"] == account["delivered"] == ROWS
    assert account["pending"] == account["dropped"] == 0
    lines = answers(tmp_path)
    assert [line["row"] for line in lines] == list(range(ROWS))
    edge, cloud = (expected(images(ROWS), seed).argmax(1) for seed in (0, 1))
    for line in lines:
        assert line["source"] in {"edge", "cloud"}
        assert line["label"] == (edge if line["source"] == "edge" else cloud)[line["row"]]
    assert {line["source"] for line in lines} == {"edge", "cloud"}


def test_it_needs_neither_cloud_nor_broker_to_answer(tmp_path: Path) -> None:
    write_config(tmp_path, broker="mqtt://127.0.0.1:9", endpoint="http://127.0.0.1:9", flush_s=0.1)
    out, err = start(tmp_path).communicate(timeout=250)
    account = json.loads(out.splitlines()[-1])["account"]
    assert account["enqueued"] == account["pending"] == ROWS, err
    lines = answers(tmp_path)
    assert len(lines) == ROWS
    assert {line["source"] for line in lines} <= {"edge", "edge_degraded"}


def test_a_missing_bundle_is_told_with_what_to_do(tmp_path: Path) -> None:
    write_config(tmp_path, broker="mqtt://127.0.0.1:9", endpoint="http://127.0.0.1:9")
    (tmp_path / "small.outrider").unlink()
    device = start(tmp_path)
    out, err = device.communicate(timeout=250)
    what, hint = err.splitlines()
    assert what.startswith("error: ") and "small.outrider" in what
    assert hint.removeprefix("hint: ") not in (hint, "")
    assert device.returncode == 1 and not out


def test_sigterm_ends_it_with_its_account(tmp_path: Path, broker: Mosquitto, endpoint: EndpointProcess) -> None:
    write_config(tmp_path, broker=broker.url, endpoint=endpoint.url, rows=10_000, rate_hz=50.0)
    with Sink(broker.url):
        device = start(tmp_path)
        wait_until(lambda: len(answers(tmp_path)) > 5, what="some answers")
        device.send_signal(signal.SIGTERM)
        out, err = device.communicate(timeout=250)
    assert device.returncode == 0, err
    account = json.loads(out.splitlines()[-1])["account"]
    assert account["enqueued"] == account["delivered"] == len(answers(tmp_path))
