"""Three hundred servers drawn by chance, each of which answers, breaks, lies or stops: no call outlives its deadline.

The deadline is on a clock that the server alone moves, so that no time decides. A server that will say no more moves it
past the deadline and sends one byte, which wakes a client that waits.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from outrider_runtimes import oip
from outrider_runtimes.errors import OutriderError
from outrider_runtimes.remote import Remote
from support import servers
from support.clocks import ManualClock
from support.runners import until
from support.servers import Asked, Server

pytestmark = pytest.mark.slow

SERVERS = 300
GIVEN_S = 120.0  # real seconds too, should a wake-up be lost
X = np.float32([[1.0, 2.0], [3.0, 4.0]])
INTERIM = (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\nX: y\r\nA: b\r\n\r\n")
STATUSES = (b"200 OK", b"204 No", b"206 Part", b"301 Moved", b"400 Bad", b"404 No", b"429 Busy", b"500 No", b"503 Busy")
ODD_HEADERS = (
    b"Content-Length: 5\r\n", b"Content-Length: +5\r\n", b"Content-Length: 1, 1\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Content-Encoding: br\r\n", b" folded: yes\r\n", b"Retry-After: -1\r\n", b"Retry-After: 99999999999999999999\r\n",
    b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n", b"Connection: close\r\n",
    b"no colon\r\n", b"X:\x00\r\n", b"Location: /elsewhere\r\n", b"Upgrade: h2c\r\n",
    b"Inference-Header-Content-Length: 7\r\n",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one server says, in pieces, and what it does then. ``true``: it is the right reply, however it is framed."""

    pieces: list[bytes]
    ends: str
    true: bool
    late_at: int | None


def planned(rng: random.Random, head: bytes, body: bytes) -> Plan:
    """One server's plan, from the right reply's headers (without the length) and its body."""
    said, true = framed(rng, head, body), True
    if rng.random() < 0.5:
        said, true = spoiled(rng, said, head, body), False
    if rng.random() < 0.3:
        said = b"".join(rng.choice(INTERIM) for _ in range(rng.randint(1, 4))) + said
    pieces = cut(rng, said)
    if rng.random() < 0.3:
        pieces, true = pieces[: rng.randint(0, len(pieces) - 1)], False
    late_at = rng.randrange(len(pieces)) if pieces and rng.random() < 0.2 else None
    ends = rng.choice(("keeps", "keeps", "closes") if true else ("closes", "resets", "stops"))
    return Plan(pieces=pieces, ends=ends, true=true, late_at=late_at)


def framed(rng: random.Random, head: bytes, body: bytes) -> bytes:
    """The right reply, by its length or in chunks with extensions and trailers."""
    if rng.random() < 0.5:
        return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    chunks = b""
    for part in cut(rng, body):
        extension = rng.choice((b"", b";a", b';a="b;c"', b" ;x=1"))
        chunks += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
    trailers = b"".join(rng.choice((b"X: y\r\n", b"Content-Length: 3\r\n")) for _ in range(rng.randint(0, 3)))
    return b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n%b0\r\n%b\r\n" % (head, chunks, trailers)


def spoiled(rng: random.Random, said: bytes, head: bytes, body: bytes) -> bytes:
    """Some of it is another: bytes, the status, a header, the length."""
    how = rng.randrange(5)
    if how == 0:
        return said.replace(b"200 OK", rng.choice(STATUSES), 1)
    if how == 1:
        return said.replace(b"200 OK\r\n", b"200 OK\r\n" + rng.choice(ODD_HEADERS), 1)
    if how == 2:
        length = rng.choice((0, len(body) - 1, len(body) + 1, 10**12))
        return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, length, body)
    changed = bytearray(said)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(changed))
        if how == 3:
            changed[at] = rng.randrange(256)
        else:
            del changed[at]
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    edges = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(rng.choice((0, 1, 4, 12))))})
    return [data[start:stop] for start, stop in pairwise(edges)]


class Drawn:
    """An ``infer`` of ``support.servers`` that follows one plan after the other.

    Attributes:
        plan: the last one.
        gone: the clock has passed the deadline since ``gone`` was set to False.
        begun, ended: how many plans.
    """

    def __init__(self, seed: int, clock: ManualClock) -> None:
        self._rng = random.Random(seed)
        self._clock = clock
        self.plan: Plan | None = None
        self.gone = False
        self.begun = self.ended = 0

    def __call__(self, server: Server, connection: socket.socket, asked: Asked) -> None:
        self.begun += 1
        try:
            self._follow(server, connection, asked)
        finally:
            self.ended += 1

    def _follow(self, server: Server, connection: socket.socket, asked: Asked) -> None:
        message = servers.right_reply(server, asked)
        head = "".join(f"{name}: {value}\r\n" for name, value in message.headers.items()).encode()
        self.plan = plan = planned(self._rng, head, message.body)
        for at, piece in enumerate(plan.pieces):
            if at == plan.late_at:
                self._pass()
            connection.sendall(piece)
        if plan.ends == "resets":
            servers.reset(connection)
        elif plan.ends == "stops":
            self._pass()
            connection.sendall(b"\r")  # wakes who waits
        if plan.ends != "keeps":
            connection.shutdown(socket.SHUT_RDWR)

    def _pass(self) -> None:
        self.gone = True
        self._clock.now_s += 2 * GIVEN_S


def outcome(remote: Remote, drawn: Drawn) -> str:
    """What one call ends with: "answer", or the error's name. It is what the plan allows."""
    drawn.gone = False
    try:
        y = remote.infer({"x": X}, deadline_ms=GIVEN_S * 1e3).outputs["y"]
    except OutriderError as error:
        assert str(error) and "Traceback" not in str(error)
        ended = type(error).__name__
    else:
        ended = "answer"
        assert (y.shape, y.dtype) == (X.shape, X.dtype) and np.isfinite(y).all()
    plan = drawn.plan
    assert plan is not None
    if plan.true and plan.late_at is None and not drawn.gone:
        assert ended == "answer", plan
        np.testing.assert_array_equal(y, X * 2)
    if plan.true and plan.late_at is not None:
        assert ended == "DeadlineExceeded", plan
    return ended


@pytest.mark.parametrize("extensions", [(oip.BINARY_EXTENSION,), ()], ids=["binary", "json"])
def test_no_server_of_many_drawn_by_chance_makes_a_call_late_or_spoils_the_next(extensions):
    clock, seen = ManualClock(), Counter[str]()
    drawn = Drawn(len(extensions), clock)
    with Server(extensions=extensions) as server, Remote(server.url, model="m", clock=clock, retries=0) as remote:
        for number in range(SERVERS // 2):
            server.infer = drawn
            seen[outcome(remote, drawn)] += 1
            until(lambda: drawn.begun == drawn.ended)
            server.infer = servers.good
            y = remote.infer({"x": X}, deadline_ms=GIVEN_S * 1e3).outputs["y"]
            np.testing.assert_array_equal(y, X * 2, err_msg=f"after server {number}")
        assert len(remote._transport._client._wires) == 1
    wanted = {"answer", "ReplyError", "RemoteUnavailable", "RemoteRefused", "DeadlineExceeded"}
    assert set(seen) == wanted, seen
