"""Requests that come too slowly: uvicorn with the endpoint's protocol in a thread, its times made short."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from outrider.endpoint.app import build_app
from outrider.endpoint.protocol import BoundedProtocol


class Hasty(BoundedProtocol):
    head_timeout_s = 0.3
    body_timeout_s = 0.6


@contextlib.contextmanager
def running() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            build_app({}), http=Hasty, ws="none", lifespan="off", log_config=None, log_level="error", access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address():
    with running() as address:
        yield address


def until_closed(connection: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            got += data
    return got


HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a request line": b"POST /v2",
    "half a head": HEAD[:-2],
}


@pytest.mark.parametrize("name", SLOW)
def test_a_head_that_does_not_come_is_408(address, name):
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(SLOW[name])
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_a_dripping_head_is_408(address):
    with socket.create_connection(address, timeout=30) as connection:
        begun_s = time.monotonic()
        with contextlib.suppress(OSError):
            for at in range(len(HEAD)):
                connection.sendall(HEAD[at : at + 1])
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
                    break
            else:
                pytest.fail("the whole head was taken")
        assert time.monotonic() - begun_s < 3


def test_an_unknown_model_is_refused_before_its_body_comes_and_the_body_has_its_time_too(address):
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(HEAD + b"{")
        got = until_closed(connection)
        assert got.startswith(b"HTTP/1.1 404 ")


def test_the_time_begins_anew_with_each_request(address):
    with socket.create_connection(address, timeout=30) as connection:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < 1.0:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            got = connection.recv(65536)
            while not got.endswith(b"}"):
                got += connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 200 ")


def test_a_refused_head_does_not_take_the_place_of_an_earlier_reply(address):
    """The first reply is whole before the second request is refused, or is left out; it is never the refusal."""
    with socket.create_connection(address, timeout=30) as connection:
        many = b"".join(b"X: y\r\n" for _ in range(200))
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\nGET /v2 HTTP/1.1\r\n" + many + b"\r\n")
        got = until_closed(connection)
        assert not got or got.startswith(b"HTTP/1.1 200 ")
