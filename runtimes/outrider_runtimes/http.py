"""An HTTP/1.1 client whose deadline covers the whole exchange: name, connect, TLS, every write and every read.

A time-out of a single read is not a deadline: a server that drips a byte now and then keeps such a client for ever.
Here each system call waits no longer than what is left. Nothing is redirected, no proxy is asked, no compression is
asked for or taken, and status line, headers, interim replies and body are bounded before they are kept.
"""

from __future__ import annotations

import ipaddress
import math
import re
import socket
import ssl
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from outrider_runtimes._forked import tell_of_fork
from outrider_runtimes._names import Address, literals, lookup
from outrider_runtimes._wire import Body, HttpReply, Wire, exchange_on
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    OutriderError,
    RemoteUnavailable,
    RunnerClosed,
)
from outrider_runtimes.tls import AnyTls, tls_failure, verifying_context

HTTP_SCHEMES = ("http", "https")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where requests go: a scheme, a host, a port, and a path that stands before every target."""

    scheme: str
    host: str
    port: int
    prefix: str = ""

    @classmethod
    def from_url(cls, url: str, *, schemes: Collection[str] = HTTP_SCHEMES) -> Origin:
        """``http://host:8000`` or ``https://host/prefix``; a final ``s`` says encrypted. Raises ConfigError."""
        hint = f"an endpoint is given as {' or '.join(f'{scheme}://host:port' for scheme in schemes)}"
        shown = repr(url) if "@" not in url else "what was given"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"{shown} is not a URL", hint=hint) from None
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("an endpoint's URL has no user, query or fragment", hint="pass a token as token=")
        if parts.scheme not in schemes or not parts.hostname:
            raise ConfigError(f"{shown} is not the URL of an endpoint", hint=hint)
        if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
            raise ConfigError(f"{shown} has characters that a URL does not have", hint=hint)
        default = 443 if parts.scheme.endswith("s") else 80
        return cls(
            scheme=parts.scheme,
            host=parts.hostname.replace("%25", "%", 1),  # RFC 6874: on which of our networks a link-local one is
            port=default if port is None else port,
            prefix=parts.path.rstrip("/"),
        )

    @property
    def address(self) -> str:
        """``host:port``, as messages and the Host header write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """As it was given, but for what may be left out of it."""
        return f"{self.scheme}://{self.address}{self.prefix}"

    @property
    def encrypted(self) -> bool:
        """Whether it is spoken to over TLS."""
        return self.scheme.endswith("s")

    @property
    def loopback(self) -> bool:
        """Whether it is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class HttpClient:
    """Connections to one origin, reused one request at a time; safe from several threads.

    A forked child makes its own: on one that two processes share, each could read the other's reply.

    Args:
        origin: where to.
        tls: for https; None trusts what this machine trusts; see ``tls``.
        max_idle: connections that are kept for the next request.
    """

    def __init__(self, origin: Origin, *, tls: AnyTls | None = None, max_idle: int = 4) -> None:
        self.origin = origin
        check_tls(origin, tls)
        self._tls = verifying_context(tls) if origin.encrypted else None
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._wires: set[Wire] = set()
        self._closed = False
        self._closing: Future[None] = Future()
        tell_of_fork(self)

    def get(
        self, target: str, *, deadline: Deadline, headers: Mapping[str, str] | None = None, max_reply_bytes: int
    ) -> HttpReply:
        """One GET and its whole reply, whatever its status.

        A kept connection that the server has closed meanwhile is replaced once.

        Raises:
            DeadlineExceeded: no whole reply in time.
            RemoteUnavailable: no connection, or it broke before the reply was whole.
            ReplyError: a reply that HTTP or the bounds do not allow.
            RunnerClosed: the client was closed.
        """
        return self.send(self.head("GET", target, headers or {}) + b"\r\n", Body(), deadline, max_reply_bytes)

    def head(self, method: str, target: str, headers: Mapping[str, str]) -> bytes:
        """A request's head without its end, for ``send``: what many requests begin with is made once."""
        there = re.sub(r"%[^\]]*\]", "]", self.origin.address)  # what our networks are called is nothing to the server
        lines = [f"{method} {self.origin.prefix}{target} HTTP/1.1", f"Host: {there}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, ""]).encode("latin-1")

    def send(self, head: bytes, body: Body, deadline: Deadline, max_reply_bytes: int) -> HttpReply:
        """As ``get``, with a body and a head that is whole: its content length is the body's."""
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
            if self._closed:
                return
            self._closed = True
            self._closing.set_result(None)
            idle, self._idle = self._idle, []
            wires = list(self._wires)
        for wire in wires:
            wire.wake()
        for wire in idle:
            wire.close()

    def forked(self) -> None:
        """As ``Forked`` says: this process's ends of the connections are closed, nothing is sent or shut down."""
        self._lock = threading.Lock()
        for wire in self._wires:
            with suppress(OSError):
                wire.close()
        self._idle, self._wires = [], set()
        self._closing = Future()
        if self._closed:
            self._closing.set_result(None)

    def _on(self, wire: Wire, head: bytes, body: Body, deadline: Deadline, cap: int) -> HttpReply:
        reusable = False
        wire.received = False
        try:
            reply = exchange_on(wire, head, body, deadline, cap)
            reusable = reply.reusable
            return reply
        except (OutriderError, OSError) as error:
            raise self._typed(error, deadline) from None
        finally:
            self._release(wire, reusable)

    def _typed(self, error: OSError | OutriderError, deadline: Deadline) -> OutriderError:
        """What broke, as the caller is told. A socket's own time-out has no errno; the kernel's has one."""
        if self._closed:
            return RunnerClosed(f"the connection to {self.origin.address} was closed here")
        if isinstance(error, OutriderError):
            return error
        if deadline.passed or (isinstance(error, TimeoutError) and error.errno is None):
            return DeadlineExceeded(f"no whole reply from {self.origin.address} in time")
        if isinstance(error, ssl.SSLError):
            return tls_failure(self.origin.address, error)
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
            if reusable and not self._closed and len(self._idle) < self._max_idle:
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
                if isinstance(failure, RemoteUnavailable):
                    failure.unsent = not isinstance(error, ssl.SSLError)
            if self._closed or deadline.passed:
                break
        raise failure

    def _connected(self, address: Address, share_s: float | None, deadline: Deadline) -> Wire:
        family, where = address
        wire = Wire(socket.socket(family, socket.SOCK_STREAM))
        with self._lock:
            if self._closed:
                wire.close()
                raise RunnerClosed(f"the client of {self.origin.address} is closed")
            self._wires.add(wire)
        try:
            wire.connect(where, share_s)
            if self._tls is not None:
                wire.wrap(self._tls, self.origin.host.partition("%")[0])
                # close() may have woken the socket that was wrapped a moment ago.
                if self._closed:
                    raise RunnerClosed(f"the client of {self.origin.address} is closed")
                wire.shake_hands(deadline)
        except BaseException:
            self._release(wire, False)
            raise
        return wire

    def _addresses(self, deadline: Deadline) -> list[Address]:
        known = literals(self.origin.host, self.origin.port)
        if known:
            return known
        looked_up = lookup(self.origin.host, self.origin.port)
        either: list[Future[Any]] = [looked_up, self._closing]
        left_s = deadline.remaining_s()
        wait(either, timeout=None if left_s == math.inf else left_s, return_when=FIRST_COMPLETED)
        if self._closed:
            raise RunnerClosed(f"the client of {self.origin.address} is closed")
        if not looked_up.done():
            raise DeadlineExceeded(f"the name {self.origin.host!r} was not resolved in time")
        try:
            return looked_up.result()
        except OSError as error:
            raise RemoteUnavailable(f"{self.origin.host}: {error.strerror or error}") from None


def check_tls(origin: Origin, tls: AnyTls | None) -> None:
    """Raise ConfigError where ``tls`` would not be used."""
    if tls is not None and not origin.encrypted:
        raise ConfigError(
            f"tls= is given and the URL is {origin.scheme}", hint=f"write {origin.scheme}s:// or leave tls= out"
        )
