"""uvicorn's HTTP protocol with the bounds that it lacks: on headers, on pipelines, on how slowly a request comes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_PIPELINE = 16


class _Refused(Exception):
    """Raised inside the parser's callbacks, which ends the parse; the protocol then sends ``status``."""


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a head beyond its bounds with 431 and a request that does not come to its end with 408."""

    head_timeout_s = 10.0
    body_timeout_s = 60.0  # 64 MiB at a little over 1 MB/s

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._refusal: tuple[int, str] | None = None
        self._in_head = False
        self._heads = 0
        self._parsed_bytes = 0
        self._fed_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; its first head must come in time."""
        super().connection_made(transport)
        self._expect(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then bound what the parser keeps of a head that has no end yet."""
        if self.transport.is_closing():
            return
        heads = self._heads
        super().data_received(data)
        if self._in_head and self._heads == heads and not self.transport.is_closing():
            self._fed_bytes += len(data)
            if self._fed_bytes > MAX_HEAD_BYTES:
                self._refusal = (431, "the request's head is too long")
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong as JSON, unless an earlier request on this connection waits for its reply, and close."""
        status, text = self._refusal or (400, "not a valid HTTP request")
        body = json.dumps({"error": text}).encode()
        head = [
            STATUS_LINE[status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        cycle = self.cycle
        reading_body = not self._in_head and not self.pipeline
        if cycle is None or cycle.response_complete or (reading_body and not cycle.response_started):
            self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._parsed_bytes, self._fed_bytes = True, 0, 0
        self._expect(self.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header."""
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(431, f"the request has more than {MAX_HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head ends; the body must come in time."""
        if len(self.pipeline) >= MAX_PIPELINE:
            self._refuse(400, f"more than {MAX_PIPELINE} requests were sent ahead of their replies")
        self._in_head = False
        self._heads += 1
        self._expect(self.body_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._expect(None)
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head has more than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, text: str) -> None:
        self._refusal = (status, text)
        raise _Refused(text)

    def _expect(self, timeout_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self._refusal = (408, "the request did not come in time")
        self.send_400_response("")
