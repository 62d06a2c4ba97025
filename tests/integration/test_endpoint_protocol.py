"""Requests that come too slowly: uvicorn with the endpoint's protocol in a thread, its times made short.

Only those times are short that the test is about: a stalled machine is not taken for a slow caller.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette

from outrider.endpoint.app import build_app
from outrider.endpoint.calls import access
from outrider.endpoint.intake import Intake
from outrider.endpoint.models import Models, Served
from outrider.endpoint.protocol import BoundedProtocol
from outrider_runtimes import oip
from support.broker import wait_until
from support.endpoints import Named


class Unhurried(BoundedProtocol):
    head_timeout_s = body_timeout_s = unread_timeout_s = linger_s = read_timeout_s = 300.0


class Hasty(Unhurried):
    """What the caller sends has to come soon."""

    head_timeout_s = 0.3
    body_timeout_s = 0.6
    linger_s = 0.5


class Cutting(Unhurried):
    """Who does not read, or does not send what nobody wants any more, is not waited for."""

    read_timeout_s = unread_timeout_s = 0.3
    linger_s = 0.5


@contextlib.contextmanager
def running(
    app: Starlette | None = None, protocol: Any = Unhurried, keep_alive_s: int = 75, *, direct: bool = True
) -> Iterator[tuple[tuple[str, int], uvicorn.Server]]:
    """``direct``: whether what came whole goes the short way, as in the endpoint, or all goes the application's."""
    digits = Named()
    app = app or build_app(Models([Served(name="m", runner=digits)]))
    if direct:
        protocol = functools.partial(protocol, direct=app.state.endpoint.direct)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, http=protocol, ws="none", loop="asyncio", lifespan="off", log_config=None,
            timeout_keep_alive=keep_alive_s, server_header=False, date_header=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname(), server
        finally:
            server.should_exit = True
            thread.join(120)
            assert not thread.is_alive()
            digits.close()


@pytest.fixture(scope="module")
def address():
    with running() as (address, _):
        yield address


@pytest.fixture(scope="module")
def hasty():
    with running(protocol=Hasty) as (address, _):
        yield address


@pytest.fixture(scope="module")
def cutting():
    with running(protocol=Cutting) as (address, _):
        yield address


def until_closed(connection: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            got += data
    return got


HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
UNKNOWN = HEAD.replace(b"/m/", b"/other/")
SLOW = {
    "nothing": b"",
    "half a request line": b"POST /v2",
    "half a head": HEAD[:-2],
}


@pytest.mark.parametrize("name", SLOW)
def test_a_head_that_does_not_come_is_408(hasty, name):
    with socket.create_connection(hasty, timeout=120) as connection:
        connection.sendall(SLOW[name])
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def dripped(connection: socket.socket, pieces: Iterable[bytes]) -> bytes:
    """What comes back while they are sent one after the other, slowly."""
    connection.settimeout(0.05)
    with contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            with contextlib.suppress(TimeoutError):
                return connection.recv(65536)
    connection.settimeout(30)
    return until_closed(connection)


def test_a_dripping_head_is_408(hasty):
    with socket.create_connection(hasty, timeout=120) as connection:
        got = dripped(connection, [HEAD[:-2], b"X: ", *[b"x"] * 10_000])
        assert got.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"{", b"{" * 99])
def test_a_body_that_does_not_come_to_its_end_is_408(hasty, begun):
    with socket.create_connection(hasty, timeout=120) as connection:
        connection.sendall(HEAD + begun)
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 408 ") and got.count(b"HTTP/1.1 ") == 1


def test_a_dripping_body_is_408_whatever_of_it_has_come(hasty):
    with socket.create_connection(hasty, timeout=120) as connection:
        connection.sendall(HEAD.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked"))
        got = dripped(connection, itertools.repeat(b"1\r\n \r\n"))
        assert got.startswith(b"HTTP/1.1 408 ")


def test_an_unknown_model_is_refused_before_its_body_comes_and_the_rest_of_it_is_not_waited_for_long(cutting):
    with socket.create_connection(cutting, timeout=120) as connection:
        connection.sendall(HEAD.replace(b"/m/", b"/other/") + b"{")
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 404 ") and got.count(b"HTTP/1.1 ") == 1


def test_a_body_that_was_refused_unread_leaves_the_connection_for_the_next_request(address):
    with socket.create_connection(address, timeout=120) as connection:
        for _ in range(3):
            connection.sendall(HEAD.replace(b"/m/", b"/other/"))
            got = b""
            while not got.endswith(b"}"):
                got += connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 404 ")
            connection.sendall(b"x" * 100)


def test_a_caller_who_does_not_read_its_reply_is_cut():
    """Its reply is far longer than what the kernel keeps for it."""
    message = oip.encode_request({"x": np.zeros((1_000_000, 4), np.float32)})
    head = HEAD.replace(b"Content-Length: 100\r\n\r\n", message.head(len(message.body)))
    short = running(protocol=Cutting)
    with short as (address, server), socket.create_connection(address, timeout=120) as connection:
        connection.sendall(head + message.body)
        first = connection.recv(1000)
        assert first.startswith(b"HTTP/1.1 200 ")
        length = int(re.search(rb"content-length: (\d+)", first)[1])
        wait_until(lambda: not server.server_state.connections)
        assert len(first + until_closed(connection)) < length


def test_the_reason_reaches_a_caller_who_is_still_sending(address):
    """A socket that is closed over unread bytes is reset, and takes the reply with it."""
    for _ in range(5):
        with socket.create_connection(address, timeout=120) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 3_000_000)
            assert until_closed(connection).startswith(b"HTTP/1.1 431 ")


def test_the_time_begins_anew_with_each_request(hasty):
    """In three times that time. Where the machine stalls for a third of it, that proves nothing: once more."""
    while not all(took_s < Hasty.head_timeout_s / 3 for took_s in exchanges(hasty, for_s=3 * Hasty.head_timeout_s)):
        pass


def exchanges(address: tuple[str, int], *, for_s: float) -> list[float]:
    """How long each of many requests on one connection took. All are answered, but the last one when it took long."""
    took_s: list[float] = []
    begun_s = time.monotonic()
    with socket.create_connection(address, timeout=120) as connection:
        while sum(took_s) < for_s:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while not got.endswith(b"}") and (data := connection.recv(65536)):
                got += data
            ended_s = time.monotonic()
            took_s.append(ended_s - begun_s)
            begun_s = ended_s
            if not got.startswith(b"HTTP/1.1 200 "):
                assert max(took_s) > Hasty.head_timeout_s / 3, got
                break
    return took_s


@pytest.mark.parametrize("late", [HEAD[:-2], HEAD + b"{"])
def test_a_later_request_is_bounded_as_the_first_one_is(late):
    class Later(Unhurried):
        linger_s = 0.5

    with running(protocol=Later) as (address, _), socket.create_connection(address, timeout=120) as connection:
        for _ in range(3):
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            got = connection.recv(65536)
            while not got.endswith(b"}"):
                got += connection.recv(65536)
        Later.head_timeout_s, Later.body_timeout_s = Hasty.head_timeout_s, Hasty.body_timeout_s
        connection.sendall(late)
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 408 ") and got.count(b"HTTP/1.1 ") == 1


def test_a_refused_head_does_not_take_the_place_of_an_earlier_reply(cutting):
    """The first reply is whole before the second request is refused, or is left out; it is never the refusal."""
    with socket.create_connection(cutting, timeout=120) as connection:
        many = b"".join(b"X: y\r\n" for _ in range(200))
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\nGET /v2 HTTP/1.1\r\n" + many + b"\r\n")
        got = until_closed(connection)
        assert not got or got.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("asked", "late"), [(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", b""), (UNKNOWN, b"x" * 100)])
def test_a_connection_that_asks_for_nothing_more_is_closed_whenever_its_last_body_came(asked, late):
    with running(keep_alive_s=1) as (address, _), socket.create_connection(address, timeout=120) as connection:
        connection.sendall(asked)
        assert reply(connection)[0].startswith(b"HTTP/1.1 404 " if late else b"HTTP/1.1 200 ")
        connection.sendall(late)
        assert until_closed(connection) == b""


def reply(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one reply."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536) or pytest.fail(f"closed after {got!r}")
    head, _, body = got.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65536)
    assert len(body) == length
    return head, body


TOKEN = "secret"
LET_IN = HEAD.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer secret\r\nX-Request-ID: 7")
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
FULL = {
    "plain": LET_IN,
    "a version": LET_IN.replace(b"/m/", b"/m/versions/3/"),
    "another version": LET_IN.replace(b"/m/", b"/m/versions/4/"),
    "no token": HEAD.replace(b"Host: x", b"X-Request-ID: 7"),
    "another token": LET_IN.replace(b"secret", b"Secret"),
    "compressed": LET_IN.replace(b"Host: x", b"Content-Encoding: gzip"),
    "too long": LET_IN.replace(b"Content-Length: 100", b"Content-Length: 99999999999"),
    "a lying length of the JSON": LET_IN.replace(b"Host: x", b"Inference-Header-Content-Length: -1"),
    "an encoded name": LET_IN.replace(b"/m/", b"/%6d/"),
    "a query": LET_IN.replace(b"/infer", b"/infer?x=y"),
    "to be closed": LET_IN.replace(b"Host: x", b"Connection: close"),
    "HTTP 1.0": LET_IN.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "an upgrade": LET_IN.replace(b"Host: x", b"Connection: upgrade\r\nUpgrade: h2c"),
    "waits for 100": LET_IN.replace(b"Host: x", b"Expect: 100-continue"),
}


@contextlib.contextmanager
def full(*, at_once: bool, kind: Any = Unhurried) -> Iterator[tuple[tuple[str, int], Any, contextlib.ExitStack]]:
    """An endpoint with no room in its queue until the stack is closed; refused at the head, or by the application."""
    digits = Named(version=3)
    app = build_app(Models([Served(name="m", runner=digits)]), token=TOKEN, intake=Intake(queue=1, body_bytes=64 << 20))
    endpoint = app.state.endpoint
    with running(app, kind, direct=at_once) as (address, _), contextlib.ExitStack() as stack:
        visit = stack.enter_context(endpoint.intake.visit("m", estimate_ms=lambda: None))
        stack.enter_context(visit.queued())
        yield address, endpoint, stack
    digits.close()


def accesses(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == access.name]


def refused_all(*, at_once: bool, caplog: pytest.LogCaptureFixture) -> tuple[list[Any], Any, list[Any]]:
    """The replies to ``FULL``, what was counted, and what was logged, without times."""
    caplog.clear()
    replies = []
    with full(at_once=at_once) as (address, endpoint, _), caplog.at_level("INFO", logger=access.name):
        for head in FULL.values():
            with socket.create_connection(address, timeout=120) as connection:
                connection.sendall(head)
                answer, body = reply(connection)
                status, *headers = answer.split(b"\r\n")
                replies.append((status, sorted(headers), body))
        wait_until(lambda: len(accesses(caplog)) == len(FULL))
        models = endpoint.metrics.quality()["models"]
    counted = [(m["model"], m["version"], r["reason"], r["requests"]) for m in models for r in m["reasons"]]
    lines = [json.loads(record.getMessage()) for record in accesses(caplog)]
    kept = ("request_id", "client", "method", "path", "status", "reason", "model", "version")
    return replies, sorted(counted), [[line[key] for key in kept] for line in lines]


def test_a_full_queue_refuses_at_the_head_just_as_the_application_does(caplog):
    replies, counted, logged = refused_all(at_once=True, caplog=caplog)
    by_name = dict(zip(FULL, replies, strict=True))
    assert by_name["plain"][0] == b"HTTP/1.1 429 Too Many Requests"
    assert b"retry-after: 1" in by_name["plain"][1] and b"x-request-id: 7" in by_name["plain"][1]
    assert by_name["no token"][0].startswith(b"HTTP/1.1 401 ") and by_name["too long"][0].startswith(b"HTTP/1.1 413 ")
    for found, expected in zip((replies, counted, logged), refused_all(at_once=False, caplog=caplog), strict=True):
        assert found == expected


def test_a_connection_that_was_refused_at_the_head_is_answered_when_there_is_room():
    sent = LET_IN.replace(b"Content-Length: 100", b"Content-Length: %d" % len(BODY))
    with full(at_once=True) as (address, _, stack), socket.create_connection(address, timeout=120) as connection:
        for part in (sent + BODY, sent):
            connection.sendall(part)
            assert reply(connection)[0].startswith(b"HTTP/1.1 429 ")
        connection.sendall(BODY)  # of the request that was refused before: dropped
        stack.close()
        connection.sendall(sent + BODY)
        head, body = reply(connection)
        assert head.startswith(b"HTTP/1.1 200 ") and json.loads(body)["outputs"][0]["data"] == [1, 2, 3, 4]


def test_requests_that_are_refused_at_the_head_may_be_sent_ahead_of_their_replies():
    sent = LET_IN.replace(b"Content-Length: 100", b"Content-Length: %d" % len(BODY)) + BODY
    with full(at_once=True) as (address, _, _), socket.create_connection(address, timeout=120) as connection:
        connection.sendall(40 * sent)
        got = b""
        while got.count(b"HTTP/1.1 429 ") < 40 or not got.endswith(b"}"):
            got += connection.recv(65536) or pytest.fail("closed")
        assert got.count(b"HTTP/1.1 ") == 40


def test_a_caller_who_reads_no_refusals_is_cut():
    """Then the next ones wait for it as any reply does, and no memory is filled with them."""
    sent = LET_IN.replace(b"Content-Length: 100", b"Content-Length: 0")
    short = full(at_once=True, kind=Cutting)
    with short as (address, endpoint, _), socket.create_connection(address, timeout=120) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(1000 * sent)
        assert endpoint.intake.inside() == 1


ROWS = 12 << 16  # of 16 bytes: 12 MiB each way, of which the kernel keeps less than half


def test_replies_that_nobody_reads_count_as_bytes_inside_until_they_are_read():
    message = oip.encode_request({"x": np.ones((ROWS, 4), np.float32)}, binary=True)
    head = [f"{name}: {value}" for name, value in message.headers.items()]
    sent = "\r\n".join(["POST /v2/models/m/infer HTTP/1.1", f"Content-Length: {len(message.body)}", *head, "", ""])
    asked = sent.encode() + message.body
    digits = Named()
    app = build_app(Models([Served(name="m", runner=digits)]), intake=Intake(queue=8, body_bytes=8 << 20))
    intake = app.state.endpoint.intake
    with running(app) as (address, _), contextlib.ExitStack() as stack:
        unread = []
        for n in range(2):
            unread.append(stack.enter_context(socket.create_connection(address, timeout=120)))
            unread[-1].sendall(asked)
            wait_until(lambda n=n: intake.inside() == 0 and intake.held_bytes > (n + 1) * ROWS * 16)
        with socket.create_connection(address, timeout=120) as other:
            other.sendall(asked)
            head, body = reply(other)
            assert head.startswith(b"HTTP/1.1 503 ") and "too many bytes" in json.loads(body)["error"]
        for connection in unread:
            assert len(reply(connection)[1]) > ROWS * 16
        wait_until(lambda: intake.held_bytes == 0)
        unread[0].sendall(asked)
        assert reply(unread[0])[0].startswith(b"HTTP/1.1 200 ")
    digits.close()
