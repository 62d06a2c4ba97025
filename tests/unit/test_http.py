"""The HTTP client's parts that need no server: origins, names, and the bounds on what is read."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes._wire import MAX_ERROR_BYTES, MAX_HEAD_BYTES, Wire, read_reply
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, RemoteUnavailable, ReplyError, RunnerClosed
from outrider_runtimes.http import HttpClient, Origin


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "prefix", "address", "loopback"),
    [
        ("http://127.0.0.1:8000", "http", "127.0.0.1", 8000, "", "127.0.0.1:8000", True),
        ("http://localhost", "http", "localhost", 80, "", "localhost:80", True),
        ("https://Example.org/a/b/", "https", "example.org", 443, "/a/b", "example.org:443", False),
        ("http://[::1]:9", "http", "::1", 9, "", "[::1]:9", True),
        ("http://10.0.0.1/", "http", "10.0.0.1", 80, "", "10.0.0.1:80", False),
    ],
)
def test_an_origin_is_read_from_its_url(url, scheme, host, port, prefix, address, loopback):
    origin = Origin.from_url(url)
    assert (origin.scheme, origin.host, origin.port, origin.prefix) == (scheme, host, port, prefix)
    assert (origin.address, origin.loopback) == (address, loopback)


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
        end.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    yield asked
    end.set()
    # The one thread is free again, and takes the next name.
    with pytest.raises(RemoteUnavailable):
        exchange(HttpClient(Origin.from_url("http://after.hung.invalid")), 10_000.0)


def exchange(client: HttpClient, milliseconds: float | None):
    return client.exchange("GET", "/", deadline=Deadline.after_ms(milliseconds), max_reply_bytes=1000)


def test_a_resolver_that_hangs_holds_nobody_and_no_threads(hung_names):
    before = threading.active_count()
    client = HttpClient(Origin.from_url("http://name.hung.invalid"))
    with ThreadPoolExecutor(8) as pool:
        begun_s = time.monotonic()
        for outcome in [pool.submit(exchange, client, 100.0) for _ in range(8)]:
            with pytest.raises(DeadlineExceeded, match=r"name\.hung\.invalid"):
                outcome.result(10)
        assert time.monotonic() - begun_s < 2
        assert hung_names == ["name.hung.invalid"]
        # close() wakes who waits for a name without a deadline.
        waiting = pool.submit(exchange, client, None)
        client.close()
        with pytest.raises(RunnerClosed):
            waiting.result(10)
    assert threading.active_count() <= before + 1


def test_an_address_that_refuses_is_followed_by_the_next(monkeypatch):
    """One name, two addresses: nothing listens on the first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        client = HttpClient(Origin.from_url(f"http://two.invalid:{port}"))

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        thread = threading.Thread(target=answer)
        thread.start()
        assert exchange(client, 10_000.0).body == b"hi"
        thread.join(10)
        client.close()


def reply_to(data: bytes, *, cap: int = 1000):
    """What is read from these bytes and the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=_send, args=(theirs, data))
        sender.start()
        try:
            return read_reply(Wire(ours), Deadline.after_ms(20_000.0), cap)
        finally:
            ours.close()
            sender.join(10)


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


@settings(max_examples=200, deadline=None)
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
