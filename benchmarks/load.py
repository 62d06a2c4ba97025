"""HTTP clients over kept connections, in one thread: each sends its next request when it has its reply.

They send bytes that were made before, and read a reply's length and nothing else of it, so that a reply costs some
20 us: what the clients take of the machine is measured and stored beside the rates.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

TIMEOUT_S = 60.0
RECEIVE_BYTES = 1 << 18

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a block of load gave.

    Attributes:
        rate_per_s: replies with status 200.
        p50_ms, p99_ms: from a request's first byte to its reply's last.
        failed: replies with another status.
        own_share: of one processor, what the generator took.
    """

    rate_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    own_share: float


@dataclass(kw_only=True, eq=False)
class Client:
    """One kept connection, and what came over it of the reply that is being read."""

    sock: socket.socket
    sent_s: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)
    whole: int = 0  # bytes of the reply that is being read, 0 before its head is there
    status: int = 0

    def send(self, request: bytes) -> None:
        self.sent_s = time.perf_counter()
        self.sock.sendall(request)

    def read(self) -> bool:
        """Take what came; whether a reply is whole. Raises RuntimeError where the server closed."""
        data = self.sock.recv(RECEIVE_BYTES)
        if not data:
            raise RuntimeError(f"the server closed a connection: {bytes(self.buffer[:200])!r}")
        self.buffer += data
        if not self.whole:
            head = self.buffer.find(b"\r\n\r\n")
            if head < 0:
                return False
            status, length = _STATUS.match(self.buffer), _LENGTH.search(self.buffer, 0, head + 2)
            if status is None or length is None:
                raise RuntimeError(f"not a reply with a length: {bytes(self.buffer[:200])!r}")
            self.status, self.whole = int(status[1]), head + 4 + int(length[1])
        return len(self.buffer) >= self.whole

    def taken(self) -> bytes:
        """The whole reply, to make room for the next."""
        reply = bytes(self.buffer[: self.whole])
        del self.buffer[: self.whole]
        self.whole = 0
        return reply


def post(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def run_load(
    port: int, request: bytes, *, clients: int, seconds: float, warm_up_s: float, check: Callable[[bytes], None]
) -> Loaded:
    """Keep ``clients`` requests on their way for so long.

    Args:
        warm_up_s: before the seconds that count.
        check: is given the last reply; raises where it is not the right answer.

    Raises:
        RuntimeError: the server closed a connection.
    """
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(clients):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Client(sock=sock)
            selector.register(sock, selectors.EVENT_READ, client)
            client.send(request)
        _turn(selector, request, warm_up_s)
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        taken_s, failed, last = _turn(selector, request, seconds)
        elapsed_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
    if not taken_s:
        raise RuntimeError(f"no reply with status 200: {last[:300]!r}")
    check(last)
    return Loaded(
        rate_per_s=len(taken_s) / elapsed_s,
        p50_ms=float(np.percentile(taken_s, 50)) * 1e3,
        p99_ms=float(np.percentile(taken_s, 99)) * 1e3,
        failed=failed,
        own_share=cpu_s / elapsed_s,
    )


def _turn(selector: selectors.BaseSelector, request: bytes, seconds: float) -> tuple[list[float], int, bytes]:
    """How long each reply took, how many failed, and the last good one."""
    taken_s: list[float] = []
    failed, last = 0, b""
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s or not (taken_s or failed):
        events = selector.select(TIMEOUT_S)
        if not events:
            raise RuntimeError(f"no reply within {TIMEOUT_S:.0f} s")
        for key, _ in events:
            client: Client = key.data
            if not client.read():
                continue
            reply = client.taken()
            if client.status == 200:
                taken_s.append(time.perf_counter() - client.sent_s)
                last = reply
            else:
                failed += 1
                last = last or reply
            client.send(request)
    return taken_s, failed, last
