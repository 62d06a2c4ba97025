"""The demo's processes: started, waited for until they serve, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outrider_runtimes.errors import OutriderError

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A child process with its output in files; stopped with the context.

    Args:
        name: for messages, and the stem of ``<name>.out`` and ``<name>.log`` in ``folder``.
        command: the arguments after the Python interpreter.
        serves: true as soon as the process does its work; None when that need not be waited for.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, folder: Path, serves: Callable[[], bool] | None = None
    ) -> None:
        self.name = name
        self.output = folder / f"{name}.out"
        self.log = folder / f"{name}.log"
        self._command = [sys.executable, *command]
        self._serves = serves
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Process:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it and wait until it serves. Raises OutriderError when it ends first or takes too long."""
        with self.output.open("ab") as out, self.log.open("ab") as log:
            self._child = subprocess.Popen(self._command, stdout=out, stderr=log, stdin=subprocess.DEVNULL)
        if self._serves is None:
            return
        limit = time.monotonic() + START_LIMIT_S
        while not self._serves():
            if not self.running or time.monotonic() > limit:
                self.stop()
                raise OutriderError(f"the {self.name} process did not start", hint=f"its log is {self.log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL for one that does not heed it."""
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def wait(self, limit_s: float) -> None:
        """Wait until it ends by itself. Raises OutriderError when it fails or takes longer."""
        if self._child is None:
            raise OutriderError(f"the {self.name} process was not started")
        try:
            code = self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise OutriderError(f"the {self.name} process took over {limit_s:.0f} s", hint=f"see {self.log}") from None
        if code != 0:
            raise OutriderError(f"the {self.name} process ended with code {code}", hint=f"see {self.log}")

    def last_json(self) -> dict[str, Any]:
        """The last line that it printed."""
        lines = self.output.read_text(encoding="utf-8").strip().splitlines()
        if not lines:
            raise OutriderError(f"the {self.name} process printed nothing", hint=f"see {self.log}")
        parsed: dict[str, Any] = json.loads(lines[-1])
        return parsed


def answers_http(url: str) -> Callable[[], bool]:
    """Whether a GET of the URL answers with status 200."""

    def probe() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=10.0) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    return probe


def listens(port: int) -> Callable[[], bool]:
    """Whether something accepts connections on the port of 127.0.0.1."""

    def probe() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            return False
        return True

    return probe
