"""One HTTP/1.1 connection on which no system call waits longer than a deadline, and the replies read from it."""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import OutriderError, RemoteUnavailable, ReplyError

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
# A server may send a few `100 Continue` before its reply; an endless row of them is an attack.
MAX_INTERIM = 4
# What is read of a reply that is an error anyway: enough for its message.
MAX_ERROR_BYTES = 64 << 10
MAX_CHUNK_LINE = 256
RECEIVE_BYTES = 256 << 10


_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
_LENGTH = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpReply:
    """A whole reply; header names are in lower case. ``body`` is empty where an error's was too long to keep."""

    status: int
    headers: Mapping[str, str]
    body: bytearray
    reusable: bool


class Wire:
    """One connection and what was read ahead of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = bytearray()
        self.received = False

    def connect(self, where: tuple[str, int] | tuple[str, int, int, int], timeout_s: float | None) -> None:
        self._sock.settimeout(timeout_s)
        self._sock.connect(where)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wrap(self, context: ssl.SSLContext, host: str) -> None:
        self._sock = context.wrap_socket(self._sock, server_hostname=host, do_handshake_on_connect=False)

    def shake_hands(self, deadline: Deadline) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(deadline.timeout_s())
            self._sock.do_handshake()

    def send(self, data: bytes, deadline: Deadline) -> None:
        view = memoryview(data)
        while view:
            self._sock.settimeout(deadline.timeout_s())
            view = view[self._sock.send(view) :]

    def line(self, deadline: Deadline, end: bytes, limit: int, what: str) -> bytes:
        """Up to ``end``, which is taken and not returned."""
        searched = 0
        while (at := self._ahead.find(end, searched)) < 0:
            if len(self._ahead) >= limit + len(end):
                raise ReplyError(f"{what} has more than {limit} bytes")
            searched = max(0, len(self._ahead) - len(end) + 1)
            self._ahead += self._receive(RECEIVE_BYTES, deadline)
        if at > limit:
            raise ReplyError(f"{what} has more than {limit} bytes")
        found = bytes(self._ahead[:at])
        del self._ahead[: at + len(end)]
        return found

    def take(self, count: int, into: bytearray, deadline: Deadline) -> None:
        """``count`` bytes; memory is taken as they come, not as they are announced."""
        ready = min(count, len(self._ahead))
        into += self._ahead[:ready]
        del self._ahead[:ready]
        left = count - ready
        while left:
            data = self._receive(min(left, RECEIVE_BYTES), deadline)
            into += data
            left -= len(data)

    def take_rest(self, limit: int, into: bytearray, deadline: Deadline) -> bool:
        """All that comes until the server closes; False when that is more than ``limit``."""
        into += self._ahead
        self._ahead.clear()
        while len(into) <= limit:
            self._sock.settimeout(deadline.timeout_s())
            data = self._sock.recv(RECEIVE_BYTES)
            if not data:
                return True
            into += data
        return False

    def quiet(self) -> bool:
        """Whether the connection can carry a request: nothing was sent unasked, and it was not closed."""
        if self._ahead:
            return False
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLIN)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def wake(self) -> None:
        """End what another thread waits for on this connection; closing it would not."""
        try:
            # Not SSLSocket.shutdown: that drops the TLS state under the thread that uses it.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self._sock.close()

    def _receive(self, size: int, deadline: Deadline) -> bytes:
        self._sock.settimeout(deadline.timeout_s())
        data = self._sock.recv(size)
        if not data:
            raise RemoteUnavailable("the server closed the connection before its reply was whole")
        self.received = True
        return data


def exchange_on(wire: Wire, request: bytes, deadline: Deadline, cap: int) -> HttpReply:
    try:
        wire.send(request, deadline)
    except (BrokenPipeError, ConnectionResetError) as broken:
        # A server may refuse a body that it has not read to its end, say why, and close.
        try:
            return replace(read_reply(wire, deadline, cap), reusable=False)
        except (OutriderError, OSError):
            raise broken from None
    return read_reply(wire, deadline, cap)


def read_reply(wire: Wire, deadline: Deadline, max_reply_bytes: int) -> HttpReply:
    """Status, headers and body, each bounded. Raises ReplyError, RemoteUnavailable, DeadlineExceeded, OSError."""
    for _ in range(MAX_INTERIM + 1):
        version, status, headers = _parsed_head(wire.line(deadline, b"\r\n\r\n", MAX_HEAD_BYTES, "the reply's head"))
        if status != 100:
            break
    else:
        raise ReplyError(f"more than {MAX_INTERIM} interim replies")
    if status < 200:
        raise ReplyError(f"status {status} was not asked for")
    failed = status >= 300
    body = bytearray()
    whole = True
    if status not in (204, 304):
        cap = min(max_reply_bytes, MAX_ERROR_BYTES) if failed else max_reply_bytes
        whole = _read_body(wire, headers, body, cap, deadline)
    if not whole and not failed:
        raise ReplyError(f"the reply has more than {max_reply_bytes} bytes")
    keep = version == "1" and "close" not in headers.get("connection", "").lower() and _framed(status, headers)
    return HttpReply(status=status, headers=headers, body=body if whole else bytearray(), reusable=keep and whole)


def _parsed_head(head: bytes) -> tuple[str, int, dict[str, str]]:
    lines = head.decode("latin-1").split("\r\n")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise ReplyError(f"not an HTTP/1.1 status line: {lines[0][:64]!r}")
    if len(lines) - 1 > MAX_HEADERS:
        raise ReplyError(f"the reply has more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or _HEADER_NAME.fullmatch(name) is None:
            raise ReplyError(f"not an HTTP header: {line[:64]!r}")
        key, value = name.lower(), value.strip(" \t")
        if key in headers:
            if key in ("content-length", "transfer-encoding", "inference-header-content-length"):
                raise ReplyError(f"the reply has the header {key} twice")
            value = f"{headers[key]}, {value}"
        headers[key] = value
    return match[1], int(match[2]), headers


def _framed(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the reply's end is known without closing the connection."""
    return status in (204, 304) or "content-length" in headers or "transfer-encoding" in headers


def _read_body(wire: Wire, headers: Mapping[str, str], body: bytearray, cap: int, deadline: Deadline) -> bool:
    """Fill ``body``; False when it has more than ``cap`` bytes."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ReplyError(f"the reply is compressed ({headers['content-encoding'][:32]!r}), which was not asked for")
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise ReplyError("the reply's transfer encoding is not chunked alone")
        return _read_chunks(wire, body, cap, deadline)
    if length is None:
        return wire.take_rest(cap, body, deadline)
    if _LENGTH.fullmatch(length) is None:
        raise ReplyError(f"the reply's content length is {length[:32]!r}")
    if int(length) > cap:
        return False
    wire.take(int(length), body, deadline)
    return True


def _read_chunks(wire: Wire, body: bytearray, cap: int, deadline: Deadline) -> bool:
    while True:
        match = _CHUNK_SIZE.fullmatch(wire.line(deadline, b"\r\n", MAX_CHUNK_LINE, "a chunk's length"))
        if match is None:
            raise ReplyError("a chunk's length is not a hexadecimal number")
        size = int(match[1], 16)
        if size == 0:
            break
        if len(body) + size > cap:
            return False
        wire.take(size, body, deadline)
        if wire.line(deadline, b"\r\n", 0, "a chunk"):
            raise ReplyError("a chunk is longer than its length")
        deadline.timeout_s()
    for _ in range(MAX_HEADERS):
        if not wire.line(deadline, b"\r\n", MAX_HEAD_BYTES, "a trailer"):
            return True
    raise ReplyError(f"more than {MAX_HEADERS} trailers")
