"""A real Home Assistant, without its user interface's clicks: what its page asks over HTTP, this asks."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from outrider_exporters.rehearse.userland import find_cache, made_once
from support.broker import wait_until
from support.ports import free_port
from support.pythons import find_python

PYTHON = "3.13"
# The newest that Python 3.13.0 may have, the page that it does not start without, and its MQTT integration's client.
PINS = ("homeassistant==2025.4.4", "home-assistant-frontend==20250411.0", "paho-mqtt==2.1.0")
STARTS_WITHIN_S = 120.0


def hass() -> Path:
    """The program, in an environment that is made once and kept."""
    interpreter = find_python(PYTHON)
    if interpreter is None:
        pytest.fail(f"Home Assistant takes Python {PYTHON}, and this machine has none")
    folder = find_cache(None) / PINS[0].replace("==", "-")

    def fill(staging: Path) -> None:
        subprocess.run([interpreter, "-m", "venv", "--without-pip", staging / "venv"], check=True)
        install = [str(interpreter), "-m", "pip", "--python", str(staging / "venv/bin/python"), "install", "--quiet"]
        subprocess.run([*install, "--disable-pip-version-check", *PINS], check=True)

    made_once(folder, fill)
    return folder


class HomeAssistantProcess:
    """One on 127.0.0.1 with its own user; ``add_broker`` has it find devices."""

    def __init__(self, folder: Path) -> None:
        self._python = hass() / "venv/bin/python"
        self._folder = folder
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._token = ""
        self._refresh = ""
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        lines = ["http:", "  server_host: 127.0.0.1", f"  server_port: {self._port}", "api:", "config:", "onboarding:"]
        (folder / "configuration.yaml").write_text("\n".join([*lines, ""]))

    def start(self) -> None:
        """Returns when it answers and knows its user."""
        command = [self._python, "-m", "homeassistant", "--config", self._folder, "--skip-pip", "--log-no-color"]
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        wait_until(self._is_up, timeout_s=STARTS_WITHIN_S, what=f"Home Assistant runs; {self.log()[-2000:]}")
        grant = {"grant_type": "refresh_token", "refresh_token": self._refresh} if self._refresh else self._first()
        granted = self._form({**grant, "client_id": self._client})
        self._token, self._refresh = granted["access_token"], granted.get("refresh_token", self._refresh)
        wait_until(lambda: self.get("/api/config")["state"] == "RUNNING", timeout_s=STARTS_WITHIN_S, what="all is up")

    def _is_up(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log()[-4000:]
        try:
            urllib.request.urlopen(f"{self._url}/api/onboarding", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code == 401  # it has a user already
        except OSError:
            return False
        return True

    def _first(self) -> dict[str, str]:
        """Makes its owner, as its first page does."""
        owner = {"client_id": self._client, "name": "trial", "username": "trial", "password": "trial", "language": "en"}
        return {"grant_type": "authorization_code", "code": self.post("/api/onboarding/users", owner)["auth_code"]}

    @property
    def _client(self) -> str:
        return f"{self._url}/"

    def stop(self) -> None:
        """SIGTERM: it writes down what it has."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def add_broker(self, port: int) -> None:
        """As its page does it: it connects before it says that it has it."""
        flow = self.post("/api/config/config_entries/flow", {"handler": "mqtt"})
        given = {"broker": "127.0.0.1", "port": port}
        done = self.post(f"/api/config/config_entries/flow/{flow['flow_id']}", given)
        assert done["type"] == "create_entry", done

    def states(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """The entities whose id, after its platform, begins so, by that id."""
        found = {each["entity_id"].split(".")[1]: each for each in self.get("/api/states")}
        return {name: each for name, each in found.items() if name.startswith(prefix)}

    def rendered(self, template: str) -> str:
        """A template of Home Assistant's own, which sees its registry of devices."""
        return str(self._asked("/api/template", {"template": template}).decode())

    def get(self, path: str) -> Any:
        return json.loads(self._asked(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return json.loads(self._asked(path, body))

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        return self._sent(urllib.request.Request(self._url + path, data, headers))

    def _form(self, fields: Mapping[str, str]) -> Any:
        data = urllib.parse.urlencode(fields).encode()
        return json.loads(self._sent(urllib.request.Request(f"{self._url}/auth/token", data)))

    def _sent(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            pytest.fail(f"{request.full_url}: {error.code} {error.read()[:500]!r}")

    def log(self) -> str:
        """All that it said."""
        return (self._folder / "output").read_text(errors="replace")

    def complaints(self) -> list[str]:
        """What it said of MQTT, templates, sensors or us that is a warning or worse."""
        about = ("mqtt", "template", "sensor", "outrider", "pi-07", "pi_07")
        bad = [line for line in self.log().splitlines() if " WARNING " in line or " ERROR " in line]
        return [line for line in bad if any(word in line.split(")", 1)[1].lower() for word in about)]

    def __enter__(self) -> HomeAssistantProcess:
        try:
            self.start()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
