"""Steps 3 to 5: endpoint, broker, consumer and device, each in a process of its own, through two outages."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.demo.console import Narrator
from outrider_exporters.demo.processes import Process, answers_http, free_port, listens
from outrider_runtimes.errors import OutriderError

DEADLINE_MS = 100.0
FLUSH_S = 60.0
# Shares of the stream. The endpoint is back before the circuit breaker asks again, 5 s after it opened.
ENDPOINT_OUTAGE = (0.25, 0.35)
BROKER_OUTAGE = (0.60, 0.75)
WORKSTATION_ONLY = {"torch", "onnx", "rich", "sklearn", "outrider_exporters"}


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Where the files and the servers of one run are; ``min_margin``: None where the bundle has thresholds."""

    folder: Path
    bundle: Path
    cloud_bundle: Path
    trust: Path
    broker_url: str | None
    rate_hz: float
    min_margin: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of the stream.

    Attributes:
        answers: the device's lines, one a row of the stream, in order.
        account: the device's telemetry account.
        consumer: the consumer's counters.
        endpoint_down, broker_down: wall-clock spans in seconds during which each was stopped.
    """

    answers: tuple[dict[str, Any], ...]
    account: dict[str, int]
    consumer: dict[str, Any]
    endpoint_down: tuple[float, float]
    broker_down: tuple[float, float] | None


def run_stream(cast: Cast, images: np.ndarray, say: Narrator) -> Outcome:
    """Start everything, stream ``images`` (float32 [N, 1, 8, 8]) through the device, stop everything."""
    with ExitStack() as stack:
        with say.step("start the cloud endpoint, the broker and the consumer"):
            endpoint_port = free_port()
            endpoint = stack.enter_context(_endpoint(cast, endpoint_port))
            broker, broker_url = _broker(cast, stack)
            consumer = stack.enter_context(_consumer(cast, broker_url))
            say.say(f"endpoint http://127.0.0.1:{endpoint_port}, broker {broker_url}")
        with say.step(f"stream {len(images)} images through the device, at {cast.rate_hz:.0f} a second"):
            device = _device(cast, images, endpoint_port, broker_url)
            stack.enter_context(device)
            director = _Director(cast.folder / "answers.jsonl", len(images), device, say)
            endpoint_down, broker_down = director.direct(endpoint, broker)
            device.wait(FLUSH_S + 30.0)
        consumer.stop()
        endpoint.stop()
    refuse_workstation_imports(device.log)
    lines = (cast.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(
        answers=tuple(json.loads(line) for line in lines),
        account=device.last_json()["account"],
        consumer=consumer.last_json(),
        endpoint_down=endpoint_down,
        broker_down=broker_down,
    )


def _endpoint(cast: Cast, port: int) -> Process:
    command = ["-m", "outrider.cli", "serve", str(cast.cloud_bundle), "--port", str(port)]
    command += ["--state", str(cast.folder / "cloud-state"), "--trust", str(cast.trust)]
    ready = answers_http(f"http://127.0.0.1:{port}/v2/health/ready")
    return Process("endpoint", command, folder=cast.folder, serves=ready)


def _broker(cast: Cast, stack: ExitStack) -> tuple[Process | None, str]:
    """The user's own broker is not ours to stop."""
    if cast.broker_url is not None:
        return None, cast.broker_url
    port = free_port()
    command = ["-m", "outrider_exporters.demo.broker", str(port)]
    broker = stack.enter_context(Process("broker", command, folder=cast.folder, serves=listens(port)))
    return broker, f"mqtt://127.0.0.1:{port}"


def _consumer(cast: Cast, broker_url: str) -> Process:
    command = ["-m", "outrider.telemetry.sink", "--broker", broker_url, "--json"]
    return Process("consumer", command, folder=cast.folder)


def device_program() -> Path:
    """The board's program: packed beside this module in a wheel, in firmware_examples of a checkout."""
    packed = Path(__file__).with_name("device.py")
    checkout = Path(__file__).parents[3] / "firmware_examples" / "raspberry_pi" / "device.py"
    return packed if packed.is_file() else checkout


def _device(cast: Cast, images: np.ndarray, endpoint_port: int, broker_url: str) -> Process:
    np.savez(cast.folder / "stream.npz", image=images)
    config = cast.folder / "device.toml"
    config.write_text(
        f'''device = "demo-device"
bundle = "{cast.bundle}"
trust = "{cast.trust}"
state = "{cast.folder / "device-state"}"
results = "{cast.folder / "answers.jsonl"}"

[input]
file = "{cast.folder / "stream.npz"}"
rate_hz = {cast.rate_hz}

[policy]
deadline_ms = {DEADLINE_MS}
{"" if cast.min_margin is None else f"min_margin = {cast.min_margin}"}

[cloud]
url = "http://127.0.0.1:{endpoint_port}"
model = "digits-large"

[broker]
url = "{broker_url}"
flush_s = {FLUSH_S}
''',
        encoding="utf-8",
    )
    command = ["-X", "importtime", str(device_program()), str(config)]
    return Process("device", command, folder=cast.folder)


class _Director:
    """Follows the device's answers and stops and starts the servers at their share of the stream."""

    def __init__(self, answers: Path, total: int, device: Process, say: Narrator) -> None:
        self._answers = answers
        self._total = total
        self._device = device
        self._say = say
        self._advance: Callable[[int], None] = lambda done: None

    def direct(
        self, endpoint: Process, broker: Process | None
    ) -> tuple[tuple[float, float], tuple[float, float] | None]:
        with self._say.progress("answered", self._total) as self._advance:
            endpoint_down = self._outage("endpoint", endpoint, ENDPOINT_OUTAGE)
            broker_down = None if broker is None else self._outage("broker", broker, BROKER_OUTAGE)
            self._follow(1.0)
        return endpoint_down, broker_down

    def _outage(self, name: str, process: Process, shares: tuple[float, float]) -> tuple[float, float]:
        self._follow(shares[0])
        process.stop()
        down = time.time()
        self._say.say(f"the {name} is stopped")
        self._follow(shares[1])
        up = time.time()
        process.start()
        self._say.say(f"the {name} is back")
        return down, up

    def _follow(self, share: float) -> None:
        """Wait until so much of the stream is answered."""
        while (done := self._count()) < share * self._total:
            if not self._device.running:
                raise OutriderError(f"the device stopped after {done} answers", hint=f"its log is {self._device.log}")
            self._advance(done)
            time.sleep(0.1)
        self._advance(done)

    def _count(self) -> int:
        return self._answers.read_bytes().count(b"\n") if self._answers.is_file() else 0


def refuse_workstation_imports(log: Path) -> None:
    """Python's own import log must name nothing that has no place on a board. Raises OutriderError."""
    text = log.read_text(encoding="utf-8", errors="replace")
    imported = {match.group(1) for match in re.finditer(r"^import time:.*\| +([A-Za-z_0-9]+)", text, re.MULTILINE)}
    if not {"outrider", "numpy"} <= imported:
        raise OutriderError("the device's import log is incomplete", hint=f"see {log}")
    if strays := imported & WORKSTATION_ONLY:
        raise OutriderError(f"the device imported {sorted(strays)}, which have no place on a board", hint=f"see {log}")
