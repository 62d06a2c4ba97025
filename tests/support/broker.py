"""A real mosquitto on 127.0.0.1, to be started, killed, stopped and started again on the same port."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest

from support.ports import free_port

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def wait_until(condition: Callable[[], object], *, timeout_s: float = 120.0, what: str = "") -> None:
    """Return as soon as the condition holds; fail the test when it does not in time."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            pytest.fail(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.005)


class Mosquitto:
    """One broker with its own configuration, persistence and log in ``folder``."""

    def __init__(self, folder: Path, *, extra: str = "", port: int | None = None) -> None:
        if MOSQUITTO is None:
            pytest.fail("mosquitto is not installed: apt-get install mosquitto")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port if port is not None else free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.log = folder / "mosquitto.log"
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {folder}/\n"
            f"log_dest stderr\nuser root\n{extra}"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None and MOSQUITTO is not None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=log, stdout=log)
        wait_until(self._answers, what=f"mosquitto answers; {self.log.read_text()[-500:]}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL: what it had only in memory is gone."""
        self.send(signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """SIGTERM: it writes down what it has."""
        if self._process is not None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            self._wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=120)  # it flushes what it writes down
        self._process = None

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
