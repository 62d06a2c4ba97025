"""An HTTP/1.1 client whose deadline covers the whole exchange: name, connect, TLS, every write and every read.

A time-out of a single read is not a deadline: a server that drips a byte now and then keeps such a client for ever.
Here each system call waits no longer than what is left. Nothing is redirected, no proxy is asked, no compression is
asked for or taken, and status line, headers, interim replies and body are bounded before they are kept.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from outrider_runtimes._names import Address, literal, lookup
from outrider_runtimes._wire import HttpReply, Wire, exchange_on
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    OutriderError,
    RemoteUnavailable,
    RunnerClosed,
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where requests go: ``http`` or ``https``, a host, a port, and a path that stands before every target."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def from_url(cls, url: str) -> Origin:
        """``http://host:8000`` or ``https://host/prefix``. Raises ConfigError."""
        hint = "an endpoint is given as http://host:port or https://host:port"
        shown = repr(url) if "@" not in url else "what was given"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"{shown} is not a URL", hint=hint) from None
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("an endpoint's URL has no user, query or fragment", hint="pass a token as token=")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{shown} is not the URL of an endpoint", hint=hint)
        if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
            raise ConfigError(f"{shown} has characters that a URL does not have", hint=hint)
        default = 443 if parts.scheme == "https" else 80
        return cls(
            scheme=parts.scheme,
            host=parts.hostname,
            port=default if port is None else port,
            prefix=parts.path.rstrip("/"),
        )

    @property
    def address(self) -> str:
        """``host:port``, as messages and the Host header write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class HttpClient:
    """Connections to one origin, reused one request at a time; safe from several threads.

    Args:
        origin: where to.
        tls: for https; None there takes the system's certificates. It must verify.
        max_idle: connections that are kept for the next request.
    """

    def __init__(self, origin: Origin, *, tls: ssl.SSLContext | None = None, max_idle: int = 4) -> None:
        self.origin = origin
        self._tls = _verifying(origin, tls)
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._wires: set[Wire] = set()
        self._closed: Future[None] = Future()

    def exchange(
        self,
        method: str,
        target: str,
        *,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_reply_bytes: int,
    ) -> HttpReply:
        """One request and its whole reply, whatever its status.

        A kept connection that the server has closed meanwhile is replaced once.

        Raises:
            DeadlineExceeded: no whole reply in time.
            RemoteUnavailable: no connection, or it broke before the reply was whole.
            ReplyError: a reply that HTTP or the bounds do not allow.
            RunnerClosed: the client was closed.
        """
        head = self._head(method, target, headers or {}, len(body) if method == "POST" else None)
        kept = self._kept()
        if kept is not None:
            try:
                return self._on(kept, head, body, deadline, max_reply_bytes)
            except RemoteUnavailable:
                if kept.received:
                    raise
        return self._on(self._opened(deadline), head, body, deadline, max_reply_bytes)

    def close(self) -> None:
        """Close all connections; calls that are waiting end with RunnerClosed."""
        with self._lock:
            if self._closed.done():
                return
            self._closed.set_result(None)
            idle, self._idle = self._idle, []
            wires = list(self._wires)
        for wire in wires:
            wire.wake()
        for wire in idle:
            wire.close()

    def _head(self, method: str, target: str, headers: Mapping[str, str], length: int | None) -> bytes:
        lines = [f"{method} {self.origin.prefix}{target} HTTP/1.1", f"Host: {self.origin.address}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if length is not None:
            lines.append(f"Content-Length: {length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _on(self, wire: Wire, head: bytes, body: bytes, deadline: Deadline, cap: int) -> HttpReply:
        reusable = False
        wire.received = False
        try:
            reply = exchange_on(wire, head + body, deadline, cap)
            reusable = reply.reusable
            return reply
        except (OutriderError, OSError) as error:
            raise self._typed(error, deadline) from None
        finally:
            self._release(wire, reusable)

    def _typed(self, error: OSError | OutriderError, deadline: Deadline) -> OutriderError:
        """What broke, as the caller is told. A socket's own time-out has no errno; the kernel's has one."""
        if self._closed.done():
            return RunnerClosed(f"the connection to {self.origin.address} was closed here")
        if isinstance(error, OutriderError):
            return error
        if deadline.passed or (isinstance(error, TimeoutError) and error.errno is None):
            return DeadlineExceeded(f"no whole reply from {self.origin.address} in time")
        if isinstance(error, ssl.SSLCertVerificationError):
            return RemoteUnavailable(
                f"the certificate of {self.origin.address} was refused: {error.verify_message}",
                hint="pass tls= with the authority that signed it; check this machine's clock",
            )
        return RemoteUnavailable(f"{self.origin.address}: {error.strerror or error or type(error).__name__}")

    def _kept(self) -> Wire | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.quiet():
                return wire
            self._release(wire, False)

    def _release(self, wire: Wire, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed.done() and len(self._idle) < self._max_idle:
                self._idle.append(wire)
                return
            self._wires.discard(wire)
        wire.close()

    def _opened(self, deadline: Deadline) -> Wire:
        addresses = self._addresses(deadline)
        failure: OutriderError = RemoteUnavailable(f"{self.origin.host} has no address")
        for left in range(len(addresses), 0, -1):
            share_s = deadline.timeout_s()
            try:
                return self._connected(addresses[-left], None if share_s is None else share_s / left, deadline)
            except OSError as error:
                failure = self._typed(error, deadline)
            if self._closed.done() or deadline.passed:
                break
        raise failure

    def _connected(self, address: Address, share_s: float | None, deadline: Deadline) -> Wire:
        family, where = address
        wire = Wire(socket.socket(family, socket.SOCK_STREAM))
        with self._lock:
            if self._closed.done():
                wire.close()
                raise RunnerClosed(f"the client of {self.origin.address} is closed")
            self._wires.add(wire)
        try:
            wire.connect(where, share_s)
            if self._tls is not None:
                wire.wrap(self._tls, self.origin.host)
                # close() may have woken the socket that was wrapped a moment ago.
                if self._closed.done():
                    raise RunnerClosed(f"the client of {self.origin.address} is closed")
                wire.shake_hands(deadline)
        except BaseException:
            self._release(wire, False)
            raise
        return wire

    def _addresses(self, deadline: Deadline) -> list[Address]:
        known = literal(self.origin.host, self.origin.port)
        if known is not None:
            return [known]
        looked_up = lookup(self.origin.host, self.origin.port)
        either: list[Future[Any]] = [looked_up, self._closed]
        wait(either, timeout=deadline.timeout_s(), return_when=FIRST_COMPLETED)
        if self._closed.done():
            raise RunnerClosed(f"the client of {self.origin.address} is closed")
        if not looked_up.done():
            raise DeadlineExceeded(f"the name {self.origin.host!r} was not resolved in time")
        try:
            return looked_up.result()
        except OSError as error:
            raise RemoteUnavailable(f"{self.origin.host}: {error.strerror or error}") from None


def _verifying(origin: Origin, tls: ssl.SSLContext | None) -> ssl.SSLContext | None:
    if origin.scheme == "http":
        if tls is not None:
            raise ConfigError("tls= is given and the URL is http", hint="write https:// or leave tls= out")
        return None
    if tls is None:
        return ssl.create_default_context()
    if tls.verify_mode != ssl.CERT_REQUIRED or not tls.check_hostname:
        raise ConfigError(
            "tls= does not verify the server",
            hint="ssl.create_default_context(cafile=...) trusts an authority of your own",
        )
    return tls
