"""`outrider serve --on ray` with two replicas, one of which is killed under load, in a network and process namespace.

    python -m support.ray_child BUNDLE STATE

Ray listens on all addresses whatever it is told. Here is no network but loopback; and when this process, the first
of its namespace, ends, the kernel ends all of Ray. It prints what it saw as a line of JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from outrider_runtimes import oip
from support.realbundles import images

TOKEN = "s3cret"
RATE_PER_S = 60
WORKERS = 8
BEFORE_S, AFTER_S = 3.0, 10.0
COUNTED = 60  # requests whose count is asked of both replicas
TIMEOUT_S = 60.0
SETUP = 'ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"'


def isolated(*words: str) -> list[str]:
    """A command in namespaces of its own: loopback is up, and what Ray leaves in /tmp/ray is gone afterwards."""
    return ["unshare", "--net", "--pid", "--fork", "--mount-proc", "sh", "-c", SETUP, "sh", *words]


class Load:
    """Requests at a fixed rate, whatever becomes of them; each is noted as (when its answer was there, status or 0)."""

    def __init__(self, url: str) -> None:
        self._where = urlsplit(url).netloc
        self._due: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self.seen: list[tuple[float, int]] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        message = oip.encode_request({"image": images(1)}, id="1", timeout_us=int(TIMEOUT_S * 1e6))
        self._body, self._headers = message.body, message.headers | {"Authorization": f"Bearer {TOKEN}"}

    def run(self, events: list[tuple[float, object]], seconds: float) -> float:
        """For so long; `events` are called at their times. Returns when it began."""
        for thread in self._threads:
            thread.start()
        begun = time.monotonic()
        for number in range(int(seconds * RATE_PER_S)):
            due = begun + number / RATE_PER_S
            time.sleep(max(0.0, due - time.monotonic()))
            while events and due - begun >= events[0][0]:
                events.pop(0)[1]()
            self._due.put(due)
        for _ in self._threads:
            self._due.put(None)
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)
        return begun

    def _work(self) -> None:
        connection = http.client.HTTPConnection(self._where, timeout=TIMEOUT_S)
        while self._due.get() is not None:
            status = 0
            try:
                connection.request("POST", "/v2/models/tiny/infer", self._body, self._headers)
                reply = connection.getresponse()
                reply.read()
                status = reply.status
            except OSError:
                connection.close()
            self.seen.append((time.monotonic(), status))
        connection.close()


def replicas() -> list[int]:
    """The processes of the replicas."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"ServeReplica:" in (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return found


def asked(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    read = reply.read()
    connection.close()
    return reply.status, read


def status_of(*request: Any, **headers: str) -> int:
    return asked(*request, **headers)[0]


def post(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    message = oip.encode_request({"image": images(1)}, id="1", timeout_us=int(TIMEOUT_S * 1e6))
    return asked(url, "POST", "/v2/models/tiny/infer", message.body, **message.headers, **headers)


class Held:
    """A request of which a replica has the head, and whose body is still on its way."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        message = oip.encode_request({"image": images(1)}, id="1")
        self._body = message.body
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=2 * TIMEOUT_S)
        self._connection.putrequest("POST", "/v2/models/tiny/infer")
        for name, value in (message.headers | headers | {"Content-Length": str(len(self._body))}).items():
            self._connection.putheader(name, value)
        self._connection.endheaders(self._body[:10])
        ends_s = time.monotonic() + TIMEOUT_S
        while not self._inside(text := asked(url, "GET", "/metrics", **headers)[1].decode()):
            if time.monotonic() > ends_s:
                raise SystemExit(f"no replica has the request: {text}")

    @staticmethod
    def _inside(text: str) -> bool:
        lines = [line for line in text.splitlines() if line.startswith("outrider_requests_inflight{")]
        return any(line.endswith(" 1.0") for line in lines)

    def finish(self) -> int:
        """Send the rest; the status of the reply."""
        self._connection.send(self._body[10:])
        return self._connection.getresponse().status


def counted_by_both(url: str, **headers: str) -> dict[str, Any]:
    """Send ``COUNTED`` requests; what /v2/quality and /metrics then say. A request is counted just after its reply."""
    for _ in range(COUNTED):
        post(url, headers)
    ends_s = time.monotonic() + TIMEOUT_S
    while True:
        quality = json.loads(asked(url, "GET", "/v2/quality", **headers)[1])
        if quality["total"]["requests"] >= COUNTED or time.monotonic() > ends_s:
            return {"quality": quality, "metrics": asked(url, "GET", "/metrics", **headers)[1].decode()}


def main(bundle: str, state: str) -> None:
    command = [sys.executable, "-m", "outrider.cli", "serve", bundle, "--state", state, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--on", "ray", "--replicas", "2"],
        env=os.environ | {"OUTRIDER_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    for line in server.stderr:
        said.append(line)
        if line.startswith("serving "):
            break
    else:
        raise SystemExit("".join(said))
    threading.Thread(target=server.stderr.read, daemon=True).start()
    url = line.split()[-1]
    guarded = {"Authorization": f"Bearer {TOKEN}"}
    counted = counted_by_both(url, **guarded)
    load = Load(url)
    before = replicas()
    begun = load.run([(BEFORE_S, lambda: os.kill(before[0], signal.SIGKILL))], BEFORE_S + AFTER_S)
    killed = begun + BEFORE_S
    after = [status for ended, status in load.seen if ended >= killed]  # who was being answered then, too
    told = {
        **counted,
        "replicas_before": len(before),
        "before": [status for ended, status in load.seen if ended < killed],
        "after": after,
        "live": status_of(url, "GET", "/v2/health/live"),
        "no_token": status_of(url, "GET", "/v2/models/tiny"),
        "model": status_of(url, "GET", "/v2/models/tiny", **guarded),
        "bad": status_of(url, "POST", "/v2/models/tiny/infer", b"{}", **guarded),
        "unknown": status_of(url, "GET", "/v2/models/none", **guarded),
    }
    held = Held(url, guarded)
    server.send_signal(signal.SIGTERM)
    new = [200]
    while new[-1] == 200:
        new.append(post(url, guarded)[0])
    told |= {"held": held.finish(), "new": new[-1]}
    out, _ = server.communicate(timeout=200)
    print(json.dumps({**told, "code": server.returncode, "out": out, "replicas_left": len(replicas())}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
