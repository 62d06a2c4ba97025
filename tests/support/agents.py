"""A real agent in its own process, with systemd's end of its notifications, and the operator's side of its commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from outrider.agent.sender import Sender
from outrider.bundle import save_keypair
from outrider.telemetry.mqtt import parse_broker
from outrider_runtimes.errors import AgentError
from support.broker import Mosquitto, wait_until
from support.keys import private_key
from support.realbundles import images, make_real_bundle

DEVICE = "pi-07"


class Home:
    """A board's folder: a configuration, bundles of two versions, an inbox, and the key of one operator."""

    def __init__(self, folder: Path, broker_url: str) -> None:
        self.folder = folder
        self.inbox = folder / "inbox"
        self.answers_path = folder / "answers.jsonl"
        self.config = folder / "agent.toml"
        self.key = folder / "keys" / "operator.key"
        self.state = folder / "state"
        self.broker_url = broker_url
        self.inbox.mkdir()
        save_keypair(folder / "keys", "operator", private_key(1))
        make_real_bundle(folder / "tiny.outrider", version=1, seed=0, signing_keys=[private_key(1)])
        (folder / "bundles").mkdir()
        self.second = make_real_bundle(
            folder / "bundles" / "tiny-2.outrider", version=2, seed=1, signing_keys=[private_key(1)]
        )
        self.configure()

    def configure(self, *, source: str = "", model: str = "", broker: str = "", more: str = "") -> None:
        """Write the configuration, with other lines for the source and more for the tables of that name."""
        source = source or 'kind = "folder"\npath = "inbox"\nsettle_s = 0\npoll_s = 0.05'
        text = f"""
device = "{DEVICE}"
state = "state"

[model]
bundle = "tiny.outrider"
{model}

[source]
{source}

[output]
file = "answers.jsonl"

[broker]
url = "{self.broker_url}"
commit_interval_ms = 20
{broker}

[commands]
keys = "keys"
bundles = "bundles"
{more}
"""
        self.config.write_text(text)

    def put(self, name: str, seed: int, *, image: np.ndarray | None = None) -> None:
        """An input into the inbox, whole at once; ``expected(images(1, seed))`` is its answer."""
        temporary = self.inbox / f".{name}.tmp"
        with temporary.open("wb") as file:
            np.save(file, images(1, seed)[0] if image is None else image)
        temporary.rename(self.inbox / f"{name}.npy")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of answers."""
        with contextlib.suppress(FileNotFoundError):
            whole, _, _ = self.answers_path.read_text().rpartition("\n")  # one may be half written
            return [json.loads(line) for line in whole.splitlines()]
        return []

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        """The lines by the name of the input."""
        return {line["name"].removesuffix(".npy"): line for line in self.lines}

    def outputs(self, name: str) -> np.ndarray:
        """The logits that were answered, when they are there."""
        wait_until(lambda: name in self.answers, what=f"an answer to {name}")
        return np.float32(self.answers[name]["outputs"]["logits"])


@contextlib.contextmanager
def board(folder: Path) -> Iterator[Home]:
    """A home whose broker runs beside it."""
    with Mosquitto(folder / "mosquitto") as broker:
        (folder / "home").mkdir()
        yield Home(folder / "home", broker.url)


class AgentProcess:
    """``outrider agent`` of a home; its log as events, what it tells systemd as lines."""

    def __init__(
        self,
        home: Home,
        *,
        watchdog_s: float = 1.0,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "outrider.cli"),
    ) -> None:
        self.home = home
        self._program = program
        self.events: list[dict[str, Any]] = []
        self.notified: list[str] = []
        address = home.folder / "notify"
        address.unlink(missing_ok=True)
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(address))
        self._environ = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "NOTIFY_SOCKET": str(address),
            "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
            **(environ or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> AgentProcess:
        """Start it and return when it has said that it is ready."""
        command = [sys.executable, *self._program, "agent", str(self.home.config), "--json"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._environ
        )
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read_log, self._read_socket)]
        for thread in self._threads:
            thread.start()
        self.wait_for("ready")
        return self

    def _read_log(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.events.append({"event": "no json", "line": line.decode(errors="replace")})

    def _read_socket(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.notified.append(self._manager.recv(4096).decode())

    def named(self, name: str) -> list[dict[str, Any]]:
        """The events of that name."""
        return [event for event in list(self.events) if event["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """The ``count``-th event of that name, when it is there."""
        assert self.process is not None

        def there() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                self._threads[0].join(120)  # what it said last has been read
                assert self.named(name), self.events
            return len(self.named(name)) >= count

        wait_until(there, what=f"event {name} in {self.events}")
        return self.named(name)[count - 1]

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> dict[str, Any]:
        """SIGTERM: what it says at its end. It ends well, or the test fails."""
        self.send(signal.SIGTERM)
        return self.ended()

    def ended(self) -> dict[str, Any]:
        """Wait for its end."""
        assert self.process is not None and self.process.stdout is not None
        out = self.process.stdout.read()
        assert self.process.wait(timeout=200) == 0, self.events
        outcome: dict[str, Any] = json.loads(out)
        return outcome

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> AgentProcess:
        return self.start() if self.process is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        with contextlib.suppress(OSError):
            self._manager.shutdown(socket.SHUT_RDWR)
        self._manager.close()


def until_heard(operator: Sender) -> None:
    """Until its device hears commands. One that is sent before the device's connection is there is for nobody."""
    hasty = dataclasses.replace(operator, timeout_s=2.0)

    def answered() -> bool:
        try:
            return hasty.send("ping").result == "ok"
        except AgentError:
            return False

    wait_until(answered, what=f"{operator.device} hears commands")


def command(home: Home, *words: str, key: Path | None = None, code: int = 0) -> dict[str, Any]:
    """``outrider command``, and what it prints as JSON."""
    if home.broker_url.startswith("mqtt://"):
        until_heard(Sender(broker=parse_broker(home.broker_url), device=DEVICE))
    line = [sys.executable, "-m", "outrider.cli", "command", home.broker_url, DEVICE, *words, "--json"]
    line += ["--timeout-s", "150", "--expires-s", "3600"] + (["--key", str(key)] if key is not None else [])
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, (done.stdout, done.stderr)
    said: dict[str, Any] = json.loads(done.stdout)
    return said
