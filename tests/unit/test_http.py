"""The HTTP client's parts that need no server: origins, names, and the bounds on what is read."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes._names import MAX_THREADS, literals
from outrider_runtimes._transport import check_time_to_decode
from outrider_runtimes._wire import JOINED_BYTES, MAX_ERROR_BYTES, MAX_HEAD_BYTES, Body, Wire, read_reply
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, RemoteUnavailable, ReplyError, RunnerClosed
from outrider_runtimes.http import HttpClient, Origin
from support.effort import effort
from support.runners import until

FAR_S = 120.0  # that no machine is late by


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "prefix", "address", "loopback"),
    [
        ("http://127.0.0.1:8000", "http", "127.0.0.1", 8000, "", "127.0.0.1:8000", True),
        ("http://localhost", "http", "localhost", 80, "", "localhost:80", True),
        ("https://Example.org/a/b/", "https", "example.org", 443, "/a/b", "example.org:443", False),
        ("http://[::1]:9", "http", "::1", 9, "", "[::1]:9", True),
        ("http://[fe80::1%25eth0]:9", "http", "fe80::1%eth0", 9, "", "[fe80::1%eth0]:9", False),
        ("http://[fe80::1%eth0]:9", "http", "fe80::1%eth0", 9, "", "[fe80::1%eth0]:9", False),
        ("http://10.0.0.1/", "http", "10.0.0.1", 80, "", "10.0.0.1:80", False),
    ],
)
def test_an_origin_is_read_from_its_url(url, scheme, host, port, prefix, address, loopback):
    origin = Origin.from_url(url)
    assert (origin.scheme, origin.host, origin.port, origin.prefix) == (scheme, host, port, prefix)
    assert (origin.address, origin.loopback) == (address, loopback)


def test_a_link_local_address_is_on_the_network_that_it_names():
    number = socket.if_nametoindex("lo")
    for scope in ("lo", str(number)):
        assert literals(f"fe80::7%{scope}", 9) == [(socket.AF_INET6, ("fe80::7", 9, 0, number))]
    assert literals("::1", 9) == [(socket.AF_INET6, ("::1", 9, 0, 0))]
    assert literals("fe80::7%nowhere", 9) == []
    head = HttpClient(Origin.from_url("http://[fe80::7%25lo]:9")).head("GET", "/v2", {})
    assert head == b"GET /v2 HTTP/1.1\r\nHost: [fe80::7]:9\r\n"


@pytest.fixture
def hung_names(monkeypatch):
    """A resolver that does not answer until the test ends: how often it was asked."""
    asked: list[str] = []
    end = threading.Event()
    real = socket.getaddrinfo

    def hangs(host, *args, **kwargs):
        if not str(host).endswith(".hung.invalid"):
            return real(host, *args, **kwargs)
        asked.append(host)
        end.wait(FAR_S)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    yield asked
    end.set()
    # Its threads are free again, and take the next name.
    with pytest.raises(RemoteUnavailable):
        exchange(HttpClient(Origin.from_url("http://after.hung.invalid")), 1e3 * FAR_S)


def exchange(client: HttpClient, milliseconds: float | None):
    return client.get("/", deadline=Deadline.after_ms(milliseconds), max_reply_bytes=1000)


def test_a_resolver_that_hangs_holds_nobody_and_no_threads(hung_names):
    before = set(threading.enumerate())
    client = HttpClient(Origin.from_url("http://name.hung.invalid"))
    with ThreadPoolExecutor(8) as pool:
        begun_s = time.monotonic()
        for outcome in [pool.submit(exchange, client, 100.0) for _ in range(8)]:
            with pytest.raises(DeadlineExceeded, match=r"name\.hung\.invalid"):
                outcome.result(FAR_S)
        assert time.monotonic() - begun_s < FAR_S / 2
        until(lambda: hung_names)
        assert hung_names == ["name.hung.invalid"]
        # close() wakes who waits for a name without a deadline.
        waiting = pool.submit(exchange, client, None)
        client.close()
        with pytest.raises(RunnerClosed):
            waiting.result(FAR_S)
    assert len(set(threading.enumerate()) - before) <= 1


def dns_threads() -> int:
    return sum(thread.name == "outrider-dns" for thread in threading.enumerate())


def test_names_that_hang_hold_no_other_name_and_few_threads(hung_names):
    """One less than there are threads: another name, an address and localhost are not waited for."""
    hung = [HttpClient(Origin.from_url(f"http://{n}.hung.invalid")) for n in range(MAX_THREADS + 2)]
    for client in hung[: MAX_THREADS - 1]:
        with pytest.raises(DeadlineExceeded):
            exchange(client, 50.0)
    with pytest.raises(RemoteUnavailable, match="not a host name"):
        exchange(HttpClient(Origin.from_url(f"http://{'a' * 64}.invalid")), 1e3 * FAR_S)
    for client in hung[MAX_THREADS - 1 :]:
        with pytest.raises(DeadlineExceeded):
            exchange(client, 50.0)
    assert dns_threads() == MAX_THREADS
    with socket.socket() as taken:  # and listens to nobody
        taken.bind(("127.0.0.1", 0))
        for host in ("127.0.0.1", "localhost", "[::1]"):
            with pytest.raises(RemoteUnavailable):
                exchange(HttpClient(Origin.from_url(f"http://{host}:{taken.getsockname()[1]}")), 1e3 * FAR_S)
    until(lambda: len(hung_names) >= MAX_THREADS)
    assert len(hung_names) == MAX_THREADS


@pytest.mark.parametrize("first", ["refuses", "hangs"])
def test_an_address_that_does_not_connect_is_followed_by_the_next(monkeypatch, first):
    """One name, two addresses: nothing listens on the first, or nobody accepts there and its backlog is full."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as opened:
        port = listener.getsockname()[1]
        if first == "hangs":
            full = opened.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
            for _ in range(4):
                filler = opened.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        given, connect = [], Wire.connect

        def impatient(wire: Wire, where: tuple[str, int], timeout_s: float) -> None:
            given.append((where[0], timeout_s))
            connect(wire, where, timeout_s if where[0] == "127.0.0.1" else 0.02)

        monkeypatch.setattr(Wire, "connect", impatient)
        client = HttpClient(Origin.from_url(f"http://two.invalid:{port}"))

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        thread = threading.Thread(target=answer)
        thread.start()
        assert exchange(client, 100_000.0).body == b"hi"
        thread.join(FAR_S)
        client.close()
    (_, first_s), (_, second_s) = given
    assert first_s <= 50.0 < second_s  # half of the time is the second's, and what the first left of its own


def reply_to(data: bytes, *, cap: int = 1000):
    """What is read from these bytes and the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=_send, args=(theirs, data))
        sender.start()
        try:
            return read_reply(Wire(ours), Deadline.after_ms(1e3 * FAR_S), cap)
        finally:
            ours.close()
            sender.join(FAR_S)


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_the_head_is_bounded_to_the_byte():
    fill = MAX_HEAD_BYTES - len(b"HTTP/1.1 204 \r\nX: ")
    assert reply_to(b"HTTP/1.1 204 \r\nX: " + b"x" * fill + b"\r\n\r\n").status == 204
    with pytest.raises(ReplyError, match="head has more than"):
        reply_to(b"HTTP/1.1 204 \r\nX: " + b"x" * (fill + 1) + b"\r\n\r\n")


def test_the_body_is_bounded_to_the_byte():
    head = b"HTTP/1.1 200 OK\r\n"
    for framed in (
        lambda n: head + b"Content-Length: %d\r\n\r\n" % n + b"x" * n,
        lambda n: head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % n + b"x" * n + b"\r\n0\r\n\r\n",
        lambda n: head + b"\r\n" + b"x" * n,
    ):
        assert reply_to(framed(1000)).body == b"x" * 1000
        with pytest.raises(ReplyError, match="more than 1000"):
            reply_to(framed(1001))


def test_an_errors_body_is_kept_up_to_a_bound_and_the_connection_not_reused_beyond():
    head = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n"
    kept = reply_to(head % MAX_ERROR_BYTES + b"x" * MAX_ERROR_BYTES, cap=1 << 20)
    assert (len(kept.body), kept.reusable) == (MAX_ERROR_BYTES, True)
    left = reply_to(head % (MAX_ERROR_BYTES + 1) + b"x" * (MAX_ERROR_BYTES + 1), cap=1 << 20)
    assert (len(left.body), left.reusable) == (0, False)


@pytest.mark.parametrize(
    ("head", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"HTTP/1.1 204 No\r\n\r\n", True),
    ],
)
def test_a_connection_is_kept_only_where_the_replys_end_is_known(head, reusable):
    assert reply_to(head).reusable is reusable


def test_headers_are_read_as_they_are_written():
    head = b"HTTP/1.1 200 OK\r\nA:1\r\nb: \t two \t\r\nC:\r\na: 3:4\r\nContent-Length: 0\r\n\r\n"
    assert reply_to(head).headers == {"a": "1, 3:4", "b": "two", "c": "", "content-length": "0"}


@pytest.mark.parametrize(
    "line",
    [
        b"no colon",
        b": no name",
        b"a b: space in the name",
        b"a : space before the colon",
        b" folded: onto the line before",
        b"a: a line feed\nContent-Length: 5",
        b"a: a carriage return\rContent-Length: 5",
        b"a:" + b" " * 30_000 + b"\n",
        b"a" * 30_000,
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_no_header_refuses_the_reply(line, place):
    lines = [b"X: y", b"Content-Length: 0"]
    lines.insert(place, line)
    with pytest.raises(ReplyError, match="not an HTTP header"):
        reply_to(b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""]))


@pytest.mark.parametrize("line", [b"HTTP/1.1 200\nOK", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 2000", b"HTTP/2 200 OK", b""])
def test_a_reply_begins_with_a_status_line(line):
    with pytest.raises(ReplyError, match=r"not an HTTP/1\.1 status line"):
        reply_to(line + b"\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Inference-Header-Content-Length"])
def test_what_says_where_a_reply_ends_is_said_once(name):
    with pytest.raises(ReplyError, match=f"{name.lower()} twice"):
        reply_to(b"HTTP/1.1 200 OK\r\n" + f"{name}: 0\r\nX: y\r\n{name.upper()}: 0\r\n\r\n".encode())


@pytest.mark.parametrize("milliseconds", [None, 2**31 + 5.0, 2**32 + 5.0, 1e12])
def test_a_deadline_of_years_is_none_to_the_kernel(milliseconds):
    """Longer than poll can be told to wait. A socket's timeout is cut to 32 bits of milliseconds without a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        asked: list[float | None] = []

        class Told(socket.socket):
            def settimeout(self, value: float | None) -> None:
                asked.append(value)
                super().settimeout(value)

        Wire(Told(fileno=client.detach())).connect(listener.getsockname(), Deadline.after_ms(milliseconds).timeout_s())
        assert len(asked) == 1 and (milliseconds is None) is (asked[0] is None)
        assert asked[0] is None or 1e6 < asked[0] < 2**31 / 1e3
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert read_reply(Wire(ours), Deadline.after_ms(milliseconds), 1).status == 200


def test_a_body_that_the_other_side_does_not_take_is_sent_up_to_the_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours)
        with pytest.raises((TimeoutError, DeadlineExceeded)):
            wire.send(b"head", Body(b"x" * (8 << 20)), Deadline.after_ms(30.0))


@pytest.mark.parametrize("size", [0, 100, JOINED_BYTES, JOINED_BYTES + 1, 3 << 20])
def test_a_body_in_parts_arrives_whole_however_the_kernel_takes_it(size):
    ours, theirs = socket.socketpair()
    parts = [bytes([number]) * (size // 3) for number in range(3)]
    with ours, theirs, ThreadPoolExecutor(1) as reader:
        whole = reader.submit(_all_of, theirs)
        Wire(ours).send(b"head", Body(*map(memoryview, parts)), Deadline.after_ms(1e3 * FAR_S))
        ours.shutdown(socket.SHUT_WR)
        assert whole.result(FAR_S) == b"head" + b"".join(parts)


def _all_of(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(10_000):
        received += data
    return bytes(received)


def test_a_connection_is_quiet_until_something_comes_or_it_is_closed():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours)
        assert wire.quiet()
        theirs.sendall(b"x")
        assert not wire.quiet()
        wire.close()
        assert not wire.quiet()


@settings(max_examples=effort(200), deadline=None)
@given(st.data())
def test_mutated_replies_are_read_or_refused(data):
    body = data.draw(st.binary(max_size=40))
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    plain = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    reply = bytearray(b"HTTP/1.1 200 OK\r\n" + (chunked if body and data.draw(st.booleans()) else plain))
    for _ in range(data.draw(st.integers(0, 3))):
        reply[data.draw(st.integers(0, len(reply) - 1))] = data.draw(st.integers(0, 255))
    del reply[data.draw(st.integers(len(reply) // 2, len(reply))) :]
    try:
        read = reply_to(bytes(reply))
    except (ReplyError, RemoteUnavailable):
        return
    assert len(read.body) <= 1000


@pytest.mark.parametrize(
    ("raw", "needed_s"),
    [
        (b"1," * 50_000, 0.01),
        (b"[]," * 50_000, 0.115),
        (b'{"a":1},' * 50_000, 0.14),
        (bytearray(b"[{" * 50_000), 0.21),
    ],
)
def test_json_is_decoded_only_where_its_bytes_and_its_brackets_leave_the_time(raw, needed_s):
    size = len(raw)
    check_time_to_decode(raw, size, Deadline(needed_s * 1.01, clock=lambda: 0.0))
    check_time_to_decode(raw, size, Deadline(math.inf))
    with pytest.raises(DeadlineExceeded, match=f"{size} bytes"):
        check_time_to_decode(raw, size, Deadline(needed_s * 0.99, clock=lambda: 0.0))
    # What stands behind the document is not decoded.
    check_time_to_decode(raw, 0, Deadline(1e-9, clock=lambda: 0.0))
