"""Requests that are meant to do harm, to one endpoint in a process of its own, whose memory is watched throughout.

After each of them the next good request is answered; at the end the process is alive, has held no more memory than its
bounds allow, and has written no traceback.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.endpoint.protocol import MAX_CHUNKS, MAX_CONNECTIONS, MAX_OPEN
from support.endpoint_child import VERSION, Child, expected, write_models

pytestmark = pytest.mark.slow

X = np.random.default_rng(11).standard_normal((5, 4)).astype(np.float32)
BODY = json.dumps({"inputs": [{"name": "x", "shape": [5, 4], "datatype": "FP32", "data": X.tolist()}]}).encode()
INFER = "/v2/models/linear/infer"
POST = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = 1 << 20
# Each test sends one body at a time: 64 MiB of bytes and a copy of them, or 16 MiB of JSON and the objects in it.
MAX_GROWTH = 400 * MEGABYTE


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    child = Child(folder, queue=64, head_timeout_s=200.0)
    works(child)
    before = child.rss_bytes()
    yield child
    grown = child.peak_rss_bytes() - before
    errors = child.stop()
    assert "Traceback" not in errors
    assert grown < MAX_GROWTH, f"{grown / MEGABYTE:.0f} MiB"


@pytest.fixture(autouse=True)
def answers_afterwards(child):
    yield
    assert child.process.poll() is None
    works(child)


def works(child: Child) -> None:
    got = raw(child, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY, end=False)
    status, body = parted(got)
    assert status == 200
    np.testing.assert_allclose(np.reshape(body["outputs"][0]["data"], (5, 3)), expected(X), rtol=1e-5)


def raw(child: Child, *parts: bytes, end: bool = True) -> bytes:
    """What comes back for these bytes until the connection ends, or is reset."""
    with child.connection() as connection:
        return talk(connection, parts, end=end)


def talk(connection: socket.socket, parts: Iterable[bytes], *, end: bool) -> bytes:
    with contextlib.suppress(OSError):
        for part in parts:
            connection.sendall(part)
        if end:
            connection.shutdown(socket.SHUT_WR)
    got = b""
    with contextlib.suppress(OSError):
        while data := connection.recv(65536):
            got += data
    return got


def parted(got: bytes) -> tuple[int, dict]:
    """Status and JSON of the first reply."""
    head, _, rest = got.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 "), got[:200]
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    assert any(line.startswith("content-type: application/json") for line in lines)
    return int(lines[0].split()[1]), json.loads(rest[:length])


def refused(got: bytes, *statuses: int) -> str:
    status, body = parted(got)
    assert status in statuses, got[:300]
    for leak in ("Traceback", ".py", "site-packages", "/tmp", "/home", "/root"):
        assert leak not in body["error"]
    assert 0 < len(body["error"]) <= 1000
    return body["error"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEADS = {
    "one header of 50 MB": ([POST + b"X: ", *[b"x" * MEGABYTE] * 50], 431),
    "one name of 50 MB": ([POST, *[b"x" * MEGABYTE] * 50], 431),
    "one header of 40 KB": ([POST + b"X: " + b"x" * 40_000 + b"\r\n\r\n"], 431),
    "101 headers": ([POST + b"X: y\r\n" * 101 + b"\r\n"], 431),
    "100,000 headers": ([POST, *[b"X: y\r\n" * 1000] * 100], 431),
    "a target of 10 MB": ([b"GET /", *[b"x" * MEGABYTE] * 10], 431),
    "a method of 1 MB": ([b"G" * MEGABYTE], 400),
    "no version": ([b"GET /v2\r\n\r\n"], 505),
    "version 9.9": ([b"GET /v2 HTTP/9.9\r\nHost: x\r\n\r\n"], 400),
    "version 2's preface": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400),
    "TLS": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200], 400),
    "zeros": ([b"\x00" * 1000], 400),
    "a bare line feed in a value": ([b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\nc\r\n\r\n"], 400),
    "a zero in a value": ([b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n"], 400),
    "a folded value": ([b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"], 400),
    "a space before the colon": ([POST + b"Content-Length : 5\r\n\r\nhello"], 400),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(child, name):
    parts, status = HEADS[name]
    refused(raw(child, *parts), status)


METHODS = ["FOO", "CONNECT", "TRACE", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "post", ""]


@pytest.mark.parametrize("method", METHODS)
def test_methods(child, method):
    refused(raw(child, f"{method} {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()), 400, 405)


LAST = POST + b"Connection: close\r\n"
LENGTHS = {
    "more than comes": (LAST + b"Content-Length: 5000\r\n\r\n" + BODY, None),
    "less than comes": (LAST + b"Content-Length: 5\r\n\r\n" + BODY, 400),
    "none": (LAST + b"\r\n" + BODY, 400),
    "negative": (LAST + b"Content-Length: -5\r\n\r\n" + BODY, 400),
    "beyond 64 bits": (LAST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY, 400),
    "no number": (LAST + b"Content-Length: five\r\n\r\n" + BODY, 400),
    "hexadecimal": (LAST + b"Content-Length: 0x5\r\n\r\n" + BODY, 400),
    "a sum": (LAST + b"Content-Length: +5\r\n\r\n" + BODY, 400),
    "two": (LAST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY, 400),
    "a list": (LAST + b"Content-Length: 5, 5\r\n\r\n" + BODY, 400),
    "and chunks": (LAST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks of gzip": (LAST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(BODY) + b"0\r\n\r\n", 501),
    "chunks twice": (LAST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunk(BODY) + b"0\r\n\r\n", 400),
    "a coding that is none": (LAST + b"Transfer-Encoding: xchunked\r\n\r\n" + BODY, 501),
    "a gigabyte": (LAST + b"Content-Length: 1000000000\r\n\r\n", 413),
    "JSON longer than the body": (
        LAST + b"Content-Length: 2\r\nInference-Header-Content-Length: 3\r\n\r\n{}",
        400,
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_that_lie(child, name):
    request, status = LENGTHS[name]
    got = raw(child, request, end=status is None)
    if status is None:  # the caller has gone before its body was whole: nobody is answered
        assert got == b""
    else:
        refused(got, status)


CHUNKS = {
    "one byte each": [CHUNKED, *[b"1\r\n \r\n" * 1000] * (MAX_CHUNKS // 1000 + 2)],
    "nothing but heads": [CHUNKED, *[b"1;a=b\r\n \r\n" * 1000] * 200],
    "an extension without end": [CHUNKED + b"1;", *[b"x" * MEGABYTE] * 30],
    "a size without end": [CHUNKED, b"0" * MEGABYTE],
    "a size beyond 64 bits": [CHUNKED + b"fffffffffffffffff\r\n"],
    "no size": [CHUNKED + b"\r\n\r\n"],
    "a negative size": [CHUNKED + b"-1\r\n"],
    "no end of line": [CHUNKED + b"1\r\nabc\r\n"],
    "a trailer without end": [CHUNKED + b"0\r\nX: ", *[b"x" * MEGABYTE] * 30],
    "trailers without end": [CHUNKED + b"0\r\n", *[b"X: y\r\n" * 10_000] * 50],
    "70 MB": [CHUNKED, *[chunk(b" " * MEGABYTE)] * 70],
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks(child, name):
    refused(raw(child, *CHUNKS[name], end=False), 400, 413, 431)


def test_chunks_that_are_small_but_not_many_are_read(child):
    pieces = b"".join(chunk(BODY[at : at + 1]) for at in range(len(BODY)))
    head = CHUNKED.replace(b"Host", b"Connection: close\r\nHost")
    status, _ = parted(raw(child, head + pieces + b"0\r\nContent-Encoding: gzip\r\n\r\n", end=False))
    assert status == 200  # and what comes after a body is no header of it


DEPTHS = {
    "lists": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "in data": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000,
    "a million": b"[" * (1 << 20),
    "four million": b"[" * 4_000_000,
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth(child, name):
    body = DEPTHS[name]
    got = raw(child, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body, end=False)
    assert any(says in refused(got, 400) for says in ("nested deeper", "lists and objects"))


LARGE = {
    "many numbers": b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%b1]}]}' % (b"0.1," * 1_000_000),
    "many lists": b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%b[]]}]}' % (b"[]," * 1_300_000),
    "many objects": b'{"inputs":[%b{}]}' % (b"{}," * 1_300_000),
    "many keys": b"{%b}" % b",".join(b'"%d":0' % at for at in range(350_000)),
    "a long number": b'{"id":' + b"9" * 4_000_000 + b"}",
    "a long string": b'{"id":"' + b"\\u0000" * 690_000 + b'"}',
}


@pytest.mark.parametrize("name", LARGE)
def test_json_that_is_larger_when_it_is_read(child, name):
    body = LARGE[name]
    assert len(body) <= 4 << 20
    got = raw(child, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body, end=False)
    refused(got, 400)


PATHS = [
    "/v2/models/%2e%2e/infer",
    "/v2/models/..%2f..%2f..%2fetc%2fpasswd/infer",
    "/v2/models/linear%2finfer",
    "/v2/models/linear%00/infer",
    "/v2/models/%00/infer",
    "/v2/models/linear%0d%0aX:%20y/infer",
    "/v2/models/linear/infer%0a",
    "/v2/models/linear/infer%0A",
    "/v2/models/%c0%ae%c0%ae/infer",
    "/v2/models/%ff%fe/infer",
    "/v2/models/%/infer",
    "/v2/models/%zz/infer",
    "/v2/models/" + "x" * 20_000 + "/infer",
    "/v2/models/" + "%78" * 7_000 + "/infer",
    "/v2/models//infer",
    "/v2/models/ /infer",
    "//v2/models/linear/infer",
    "/v2/models/../models/linear/infer",
    "/v2/models/LINEAR/infer",
    "/v2/models/linear/infer/",
    f"/v2/models/linear/versions/{VERSION}%20/infer",
    f"/v2/models/linear/versions/0{VERSION}/infer",
    "/v2/models/linear/versions/-1/infer",
    "/v2/models/linear/versions/" + "9" * 5_000 + "/infer",
    "/v2/models/linear;a=b/infer",
    "http://127.0.0.1/v2/models/other/infer",
    "*",
]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths(child, path):
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n"
    error = refused(raw(child, request.encode() + BODY, end=False), 400, 404, 405)
    assert len(error) < 200 and "\n" not in error and "\x00" not in error


def test_an_encoded_end_of_line_ends_no_path(child):
    for path in ("/metrics", "/v2/quality", "/v2", "/v2/models/linear", "/v2/health/live"):
        head = f"GET {path}%0a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert refused(raw(child, head.encode(), end=False), 404)


def test_blanks_around_a_value_are_no_part_of_it(child):
    blanks = b"Content-Length:  %d \t \r\nContent-Encoding: identity \r\nX-Request-ID:\tseven\t\r\n\r\n" % len(BODY)
    got = raw(child, LAST + blanks + BODY, end=False)
    assert parted(got)[0] == 200 and b"x-request-id: seven\r\n" in got


def test_version_1_0_is_answered_and_closed(child):
    request = f"POST {INFER} HTTP/1.0\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    status, body = parted(raw(child, request + BODY, end=False))
    assert status == 200 and body["model_name"] == "linear"


WHOLE = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
IN_CHUNKS = CHUNKED + chunk(BODY[:40]) + chunk(BODY[40:]) + b"0\r\n\r\n"


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good request with a few bytes of it changed, left out, put in or repeated."""
    request = bytearray(draw(st.sampled_from([WHOLE, IN_CHUNKS])))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(request)))
        until = min(len(request), at + draw(st.integers(0, 12)))
        request[at:until] = draw(
            st.one_of(
                st.binary(max_size=6), st.sampled_from([b"\r\n", b"\r", b"\n", b"\x00", b"0", b":", b" ", b"%2f"])
            )
            | st.just(bytes(request[at:until]) * 2)
        )
    return bytes(request)


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=spoilt())
def test_spoilt_requests_are_answered_in_json_or_not_at_all(child, request):
    got = raw(child, request)
    if got:
        status, body = parted(got)
        assert status == 200 or body["error"]
        assert status in (200, 400, 404, 405, 413, 415, 431, 501, 505), got[:300]


def test_a_flood_of_pipelined_requests_is_cut_and_costs_no_memory(child):
    before = child.rss_bytes()
    one = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    got = raw(child, *[one * 500] * 20)
    assert got.count(b"HTTP/1.1 200 ") < 10_000
    assert child.rss_bytes() - before < 50 * MEGABYTE


def test_upgrades_are_not_made(child):
    for protocol in ("websocket", "h2c"):
        head = f"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: {protocol}\r\n\r\n"
        assert not raw(child, head.encode()).startswith(b"HTTP/1.1 101")


def test_half_closed_connections_and_those_who_never_read_do_no_harm(child):
    with contextlib.ExitStack() as stack:
        for at in range(40):
            connection = stack.enter_context(child.connection())
            connection.sendall((POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)[: 50 + at * 10])
            if at % 2:
                connection.shutdown(socket.SHUT_WR)
        works(child)


def test_more_connections_than_there_may_be_are_told_so_or_dropped(child):
    """Those that say nothing are cut after their time; those before the bound are answered meanwhile."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(child.connection())
        for _ in range(MAX_OPEN - 10):
            stack.enter_context(child.connection())
        head = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert MAX_CONNECTIONS < MAX_OPEN - 10
        with child.connection() as late:
            got = talk(late, [head], end=False)
            assert refused(got, 503) == f"more than {MAX_CONNECTIONS} connections are open"
            assert b"retry-after: 1\r\n" in got
        for _ in range(30):
            connection = stack.enter_context(child.connection())
            connection.settimeout(120)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
        assert first.fileno() > 0


def test_connections_that_wait_make_room_for_new_ones(child):
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 50):
            connection = stack.enter_context(child.connection())
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        works(child)


def test_slow_heads_and_bodies_on_many_connections_leave_room_for_others(child):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(child.connection()) for _ in range(200)]
        whole = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        for at in range(20):
            for connection in slow:
                connection.sendall(whole[at * 5 : at * 5 + 5])
        works(child)


def counting(trips: int) -> bytes:
    tensor = {"name": "trips", "shape": [], "datatype": "INT64", "data": [trips]}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = "POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def ended(child: Child) -> dict[str, int]:
    """How many requests to the slow model have, by what became of them."""
    head = b"GET /v2/quality HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    _, quality = parted(raw(child, head, end=False))
    (slow,) = [row for row in quality["models"] if row["model"] == "slow"]
    return {row["reason"]: row["requests"] for row in slow["reasons"]}


def seconds(child: Child, trips: int) -> float:
    begun_s = time.monotonic()
    assert parted(raw(child, counting(trips), end=False))[0] == 200
    return time.monotonic() - begun_s


def test_callers_who_hang_up_are_counted_as_gone_and_their_work_is_not_run(child):
    one_s = seconds(child, 300_000)
    for _ in range(60):  # 300 times as long as that one, were they run
        with child.connection() as connection:
            connection.sendall(counting(1_500_000))
    while sum(ended(child).values()) < 61:
        pass
    assert ended(child)["gone"] >= 30  # all, but for those that were answered while this process stalled
    assert seconds(child, 1) < 200 * one_s  # the first of them was inside the engine
