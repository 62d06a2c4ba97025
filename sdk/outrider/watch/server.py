"""The fleet over HTTP: one page, its stream of changes (server-sent events), ``/metrics`` and ``/fleet.json``.

The standard library's server, on this machine's loopback where nothing else is asked for. It only reads: no request
changes anything. The page is in one piece, so that nothing but this server is asked for anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Final

from outrider.telemetry.vitals import Vitals
from outrider.watch.exposition import CONTENT_TYPE, expose
from outrider.watch.fleet import Row
from outrider.watch.table import row_to_json
from outrider.watch.watcher import Watch
from outrider_runtimes.errors import ConfigError

log = logging.getLogger(__name__)

_strict = json.JSONEncoder(allow_nan=False).encode

MAX_STREAMS: Final = 32
# A page is told at most so often, and at least so often, so that either side sees a connection that is gone.
MIN_INTERVAL_S: Final = 0.25
MAX_INTERVAL_S: Final = 2.0
_TICK_S: Final = 0.25
# A page that is opened on a fleet of thousands gets the newest points of each device alone.
MAX_TOLD_POINTS: Final = 200_000
MIN_POINTS: Final = 10
_REQUEST_TIMEOUT_S: Final = 10.0


class Server:
    """Serves one watch until it is closed.

    Attributes:
        url: where the page is.
    """

    def __init__(self, watch: Watch, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Begin to serve on a thread of its own. ``port`` 0 takes a free one.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        page, policy = _page()

        class Handler(_Handler):
            pass

        Handler.watch, Handler.page, Handler.policy = watch, page, policy
        Handler.closing, Handler.streams = threading.Event(), threading.BoundedSemaphore(MAX_STREAMS)
        try:
            self._server = _Listener((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error}", hint="another program may have the port; 0 takes a free one"
            ) from error
        address, port = str(self._server.server_address[0]), int(self._server.server_address[1])
        Handler.local_only = ip_address(address).is_loopback
        self.url = f"http://{address}:{port}/"
        self._closing = Handler.closing
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="outrider-watch-http")
        self._thread.start()

    def close(self) -> None:
        """Stop to listen; the pages that are open see it."""
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Mostly whoever asked is gone; the standard library would write a traceback over the table in the terminal."""
        level = logging.DEBUG if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)) else logging.ERROR
        log.log(level, "a request of %s was not answered", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    watch: Watch
    page: bytes
    policy: str
    closing: threading.Event
    streams: threading.BoundedSemaphore
    local_only: bool

    server_version = "outrider-watch"
    sys_version = ""
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        if self.local_only and not self._asks_this_machine():
            self._answer(403, "text/plain; charset=utf-8", b"ask for 127.0.0.1 or localhost\n")
            return
        path = self.path.partition("?")[0]
        answers = {"/": self._page, "/events": self._events, "/metrics": self._metrics, "/fleet.json": self._fleet}
        answer = answers.get(path)
        if answer is None:
            self._answer(404, "text/plain; charset=utf-8", b"there are /, /metrics and /fleet.json\n")
            return
        answer()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s " + format, self.address_string(), *args)

    def _asks_this_machine(self) -> bool:
        # A page of another site that had its name point here would have that name in the request.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return host in ("127.0.0.1", "localhost", "[::1]")

    def _page(self) -> None:
        self._answer(200, "text/html; charset=utf-8", self.page)

    def _metrics(self) -> None:
        watch = self.watch
        text = expose(watch.rows(), connected=watch.connected, malformed=watch.malformed)
        self._answer(200, CONTENT_TYPE, text.encode("utf-8", "replace"))

    def _fleet(self) -> None:
        self._answer(200, "application/json", _encode(self._about(), self.watch.rows()).encode())

    def _events(self) -> None:
        """Everything that is known, then each change of it."""
        if not self.streams.acquire(blocking=False):
            self._answer(503, "text/plain; charset=utf-8", b"too many pages are open\n")
            return
        try:
            self._head(200, "text/event-stream", None)
            number = 0
            while not self.closing.is_set():
                number, changes = self.watch.changes(after=number)
                most = max(MIN_POINTS, MAX_TOLD_POINTS // max(1, len(changes)))
                points = {row.device: [_point(each) for each in new[-most:]] for row, new in changes}
                data = _encode(self._about(), [row for row, _ in changes], points)
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()
                self.closing.wait(MIN_INTERVAL_S)
                until = time.monotonic() + MAX_INTERVAL_S
                while not self.closing.is_set() and time.monotonic() < until:
                    if self.watch.wait(after=number, timeout_s=_TICK_S):
                        break
        finally:
            self.streams.release()

    def _about(self) -> dict[str, Any]:
        watch = self.watch
        return {
            "broker": str(watch.broker),
            "connected": watch.connected,
            "error": watch.last_error,
            "now_s": round(watch.now_s(), 3),
            "malformed": watch.malformed,
        }

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, size_bytes: int | None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if size_bytes is not None:
            self.send_header("Content-Length", str(size_bytes))
        self.end_headers()


def _encode(about: dict[str, Any], rows: Sequence[Row], points: Mapping[str, Any] | None = None) -> str:
    """The devices one by one: one with a number that JSON has no form for is shown without its numbers."""
    devices = []
    for row in rows:
        told = {} if points is None else {"points": points[row.device]}
        try:
            devices.append(_strict({**row_to_json(row), **told}))
        except ValueError:
            log.debug("what %s says has no form in JSON", row.device)
            bare = replace(row, told=Vitals(), event=None)
            devices.append(_strict({**row_to_json(bare), **({"points": []} if told else {})}))
    return f'{_strict(about)[:-1]}, "devices": [{", ".join(devices)}]}}'


def _point(point: Any) -> list[float | None]:
    return [point.at_s, point.per_second, point.p95_ms, point.offload_share, point.temperature_c]


def _page() -> tuple[bytes, str]:
    """The page in one piece, and the policy by which a browser runs its own script and style and nothing else."""
    folder = resources.files("outrider.watch")
    html, style, script = (folder.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode(), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
