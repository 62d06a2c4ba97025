"""One HTTP/1.1 connection on which no system call waits longer than a deadline, and the replies read from it."""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Mapping
from typing import NamedTuple

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import OutriderError, RemoteUnavailable, ReplyError

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
# A server may send a few `100 Continue` before its reply; an endless row of them is an attack.
MAX_INTERIM = 4
# What is read of a reply that is an error anyway: enough for its message.
MAX_ERROR_BYTES = 64 << 10
MAX_CHUNK_LINE = 256
# A hundred thousand of a byte take a second to read; who sends a large reply so means harm.
MAX_CHUNKS = 1 << 17
# A longer buffer is asked of the kernel and given back with every read, which takes ten times as long as to read.
RECEIVE_BYTES = 64 << 10
# A body of more is not copied to stand behind its head.
JOINED_BYTES = 16 << 10
# Longer than poll can wait.
LONGEST_POLL_MS = 2**31 - 1

# A carriage return or line feed alone is no part of a value.
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?(?=\r\n|\Z)")
_HEADER = re.compile(r"\r\n([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n]*)(?=\r\n|\Z)")
# Of these a second one would make two of one reply.
_ONCE = ("content-length", "transfer-encoding", "inference-header-content-length")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
_LENGTH = re.compile(r"[0-9]{1,18}")
_CONTINUE = b"HTTP/1.1 100"
_INTERIM = re.compile(rb"(?:%b[^\r\n]*(?:\r\n[^\r\n]+)*\r\n\r\n)*" % re.escape(_CONTINUE))


class HttpReply(NamedTuple):
    """A whole reply; header names are in lower case. ``body`` is empty where an error's was too long to keep."""

    status: int
    headers: Mapping[str, str]
    body: bytearray
    reusable: bool


class Body:
    """Bytes that lie in several places and are sent one after another."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: bytes | memoryview) -> None:
        self.parts = parts
        self.size = sum(map(len, parts))

    def __len__(self) -> int:
        return self.size


class Wire:
    """One connection and what was read ahead of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = bytearray()
        self._arrival = select.poll()
        self._arrival.register(sock, select.POLLIN)
        self._tls = False
        self.received = False
        sock.setblocking(False)

    def connect(self, where: tuple[str, int] | tuple[str, int, int, int], timeout_s: float | None) -> None:
        self._sock.settimeout(_waitable(timeout_s))
        self._sock.connect(where)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wrap(self, context: ssl.SSLContext, host: str) -> None:
        self._tls = True
        self._sock = context.wrap_socket(self._sock, server_hostname=host, do_handshake_on_connect=False)

    def shake_hands(self, deadline: Deadline) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(_waitable(deadline.timeout_s()))
            self._sock.do_handshake()

    def send(self, head: bytes, body: Body, deadline: Deadline) -> bool:
        """False where a reply came, or the server's end of it, before it had taken all: the rest is not sent."""
        # TLS would make a record of every part.
        if body.size <= JOINED_BYTES or self._tls:
            left = [memoryview(b"".join((head, *body.parts)))]
        else:
            left = [memoryview(part) for part in (head, *body.parts) if part]
        while True:
            sent = self._send_some(left, deadline)
            if sent is None:
                return False
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if not left:
                return True
            left[0] = left[0][sent:]

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
            data = self._some(RECEIVE_BYTES, deadline)
            if not data:
                return True
            into += data
        return False

    def quiet(self) -> bool:
        """Whether the connection can carry a request: nothing was sent unasked, and it was not closed."""
        if self._ahead or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            return False
        try:
            return self._sock.fileno() >= 0 and not self._arrival.poll(0)
        except OSError:
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
        data = self._some(size, deadline)
        if not data:
            raise RemoteUnavailable("the server closed the connection before its reply was whole")
        self.received = True
        return data

    def _some(self, size: int, deadline: Deadline) -> bytes:
        """What is there, waited for; empty when the server has closed."""
        if self._tls:
            self._sock.settimeout(_waitable(deadline.timeout_s()))
            return self._sock.recv(size)
        while True:
            _wait(self._arrival, deadline)
            try:
                return self._sock.recv(size)
            except BlockingIOError:  # what had arrived was damaged
                continue

    def _send_some(self, left: list[memoryview], deadline: Deadline) -> int | None:
        """How many bytes were taken; None where the server answers instead."""
        deadline.timeout_s()
        if self._tls:
            self._sock.setblocking(False)  # reading has set a timeout
        while True:
            try:
                return self._sock.send(left[0]) if len(left) == 1 else self._sock.sendmsg(left)
            except ssl.SSLWantReadError:
                _wait(self._arrival, deadline)
            except (BlockingIOError, ssl.SSLWantWriteError):
                either = select.poll()
                either.register(self._sock, select.POLLOUT | select.POLLIN)
                if not _wait(either, deadline) & select.POLLOUT and self._answered():
                    return None

    def _answered(self) -> bool:
        """Take in what has come while there is more to send: whether it is an end, or more than interim replies."""
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):  # TLS's own, or damaged
            return False
        self.received = self.received or bool(data)
        self._ahead += data
        rest = _INTERIM.sub(b"", bytes(self._ahead[:MAX_HEAD_BYTES]), count=1)
        interim = rest.startswith(_CONTINUE) or _CONTINUE.startswith(rest)
        return not data or not interim or len(self._ahead) >= MAX_HEAD_BYTES


def _wait(poll: select.poll, deadline: Deadline) -> int:
    """What is there to do on the one that is registered. Raises TimeoutError, DeadlineExceeded."""
    timeout_s = _waitable(deadline.timeout_s())
    for _, events in poll.poll(None if timeout_s is None else timeout_s * 1e3):
        return events
    raise TimeoutError


def _waitable(timeout_s: float | None) -> float | None:
    """As long as the kernel can be told to wait: Python cuts off what is above, for a socket's timeout silently."""
    return None if timeout_s is None else min(timeout_s, LONGEST_POLL_MS / 1e3)


def exchange_on(wire: Wire, head: bytes, body: Body, deadline: Deadline, cap: int) -> HttpReply:
    try:
        whole = wire.send(head, body, deadline)
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as broken:
        # A server may refuse a body that it has not read to its end, say why, and close.
        try:
            return read_reply(wire, deadline, cap)._replace(reusable=False)
        except ssl.SSLError:
            raise  # the alert says why
        except (OutriderError, OSError):
            raise broken from None
    reply = read_reply(wire, deadline, cap)
    return reply if whole else reply._replace(reusable=False)


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
        whole = not (failed and _compressed(headers)) and _read_body(wire, headers, body, cap, deadline)
    if not whole and not failed:
        raise ReplyError(f"the reply has more than {max_reply_bytes} bytes")
    keep = version == "1" and "close" not in headers.get("connection", "").lower() and _framed(status, headers)
    return HttpReply(status=status, headers=headers, body=body if whole else bytearray(), reusable=keep and whole)


def _parsed_head(raw: bytes) -> tuple[str, int, dict[str, str]]:
    head = raw.decode("latin-1")
    match = _STATUS_LINE.match(head)
    if match is None:
        raise ReplyError(f"not an HTTP/1.1 status line: {head[:64]!r}")
    count = head.count("\r\n")
    if count > MAX_HEADERS:
        raise ReplyError(f"the reply has more than {MAX_HEADERS} headers")
    found = _HEADER.findall(head, match.end())
    if len(found) != count:
        wrong = next(line for line in head.split("\r\n")[1:] if _HEADER.fullmatch("\r\n" + line) is None)
        raise ReplyError(f"not an HTTP header: {wrong[:64]!r}")
    headers = {name.lower(): value.strip(" \t") for name, value in found}
    return match[1], int(match[2]), headers if len(headers) == count else _joined(found)


def _joined(found: list[tuple[str, str]]) -> dict[str, str]:
    """Headers of which some stand twice."""
    headers: dict[str, str] = {}
    for name, value in found:
        key, stripped = name.lower(), value.strip(" \t")
        if key in headers and key in _ONCE:
            raise ReplyError(f"the reply has the header {key} twice")
        headers[key] = f"{headers[key]}, {stripped}" if key in headers else stripped
    return headers


def _compressed(headers: Mapping[str, str]) -> bool:
    coding = headers.get("content-encoding")
    return coding is not None and coding.lower() != "identity"


def _framed(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the reply's end is known without closing the connection."""
    return status in (204, 304) or "content-length" in headers or "transfer-encoding" in headers


def _read_body(wire: Wire, headers: Mapping[str, str], body: bytearray, cap: int, deadline: Deadline) -> bool:
    """Fill ``body``; False when it has more than ``cap`` bytes."""
    if _compressed(headers):
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
    for _ in range(MAX_CHUNKS):
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
    else:
        raise ReplyError(f"more than {MAX_CHUNKS} chunks")
    for _ in range(MAX_HEADERS):
        if not wire.line(deadline, b"\r\n", MAX_HEAD_BYTES, "a trailer"):
            return True
    raise ReplyError(f"more than {MAX_HEADERS} trailers")
