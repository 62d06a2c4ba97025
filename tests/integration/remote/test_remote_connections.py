"""Remote's connections, threads and queue on real sockets: what is reused, what is replaced, what is bounded."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    DeadlineExceeded,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.remote import Remote
from support import servers
from support.certificates import issue, serving
from support.hostile import BROKEN
from support.remotes import DEADLINE_MS, FOREVER_MS, LATE_S, X, ask, well
from support.runners import until
from support.servers import Server, http


def outrider_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("outrider-remote")]


def test_nothing_listening_is_unavailable_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Remote(url, model="m") as remote, pytest.raises(RemoteUnavailable, match="refused"):
            ask(remote)


def test_a_name_that_does_not_exist_is_unavailable():
    typed = pytest.raises((RemoteUnavailable, DeadlineExceeded), match="no-such-host")
    with Remote("http://no-such-host.invalid:8000", model="m") as remote, typed:
        ask(remote)


def test_a_full_backlog_ends_by_the_deadline():
    """Connects hang: nobody accepts and the queue of the listening socket is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with Remote(f"http://127.0.0.1:{listener.getsockname()[1]}", model="m") as remote:
            begun_s = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                ask(remote, DEADLINE_MS)
            assert time.monotonic() - begun_s < DEADLINE_MS / 1000 + LATE_S
            # close() wakes a connect that has no deadline.
            future = remote.submit({"x": X}, Deadline.after_ms(None))
            with pytest.raises(FutureTimeout):
                future.result(0.2)
            remote.close()
            with pytest.raises(RunnerClosed):
                future.result(LATE_S)
        for filler in fillers:
            filler.close()


def test_a_server_that_closes_after_accept_is_unavailable():
    with (
        Server(hello=lambda server, connection: servers.reset(connection)) as server,
        Remote(server.url, model="m") as remote,
    ):
        for _ in range(3):
            with pytest.raises(RemoteUnavailable):
                ask(remote)
        server.hello = None
        well(remote)


def test_a_kept_connection_that_the_server_closed_is_replaced(server, remote):
    well(remote)
    server.drop()
    well(remote)
    assert server.connections == 2


def test_a_kept_connection_that_is_closed_when_it_is_used_is_replaced_once(server, remote):
    """The server closes after it has read the request: nothing shows before it is sent."""
    well(remote)
    closes = iter([True, False])

    def once(server, connection, asked):
        if next(closes):
            servers.resets(server, connection, asked)
        servers.good(server, connection, asked)

    server.infer = once
    well(remote)
    assert server.connections == 2


def test_unasked_bytes_on_a_kept_connection_are_not_taken_for_a_reply(server, remote):
    well(remote)

    def twice(server, connection, asked):
        reply = servers.sent(servers.right_reply(server, asked))
        connection.sendall(reply + reply)

    server.infer = twice
    for _ in range(3):
        well(remote)


def test_a_server_that_refuses_a_body_unread_is_heard(server):
    """503 and close while the client is still writing: the status, or at worst a broken connection."""

    def hello(server, connection):
        connection.recv(100)
        connection.sendall(http(b'{"error": "busy"}', status="503 Service Unavailable"))
        connection.shutdown(socket.SHUT_WR)
        server.stopping.wait(0.5)

    with Remote(server.url, model="m") as remote:
        well(remote)
        server.hello = hello
        server.drop()
        big = np.zeros((2_000_000, 2), np.float32)
        with pytest.raises((RemoteRefused, RemoteUnavailable)):
            remote.submit({"x": big}, Deadline.after_ms(FOREVER_MS)).result(200)


BIG = np.ones((2_000_000, 2), np.float32)  # more than the kernel's buffers between two sockets hold


@pytest.mark.parametrize("encrypted", [False, True], ids=["http", "https"])
def test_an_answer_that_comes_before_the_request_is_sent_whole_ends_it(encrypted, tmp_path):
    """The server says that it is too long, reads no further, and keeps the connection open."""
    own = issue(tmp_path) if encrypted else None

    def hello(server, connection):
        connection = server.tls.wrap_socket(connection, server_side=True) if server.tls else connection
        connection.recv(100)
        connection.sendall(http(b'{"error": "too long"}', status="413 Content Too Large"))
        server.stopping.wait()

    with (
        Server(tls=own and serving(own)) as server,
        Remote(server.url, model="m", tls=own and own.certificate) as remote,
    ):
        well(remote)
        server.hello = hello
        server.drop()
        with pytest.raises(RemoteRefused, match="status 413: too long"):
            remote.infer(BIG, deadline_ms=FOREVER_MS)
        server.hello = None
        well(remote)


@pytest.mark.parametrize("encrypted", [False, True], ids=["http", "https"])
def test_a_body_that_the_server_does_not_take_is_sent_up_to_the_deadline(encrypted, tmp_path):
    own = issue(tmp_path) if encrypted else None
    held = []

    def hello(server, connection):
        held.append(server.tls.wrap_socket(connection, server_side=True) if server.tls else connection)
        server.stopping.wait()

    with (
        Server(tls=own and serving(own)) as server,
        Remote(server.url, model="m", tls=own and own.certificate) as remote,
    ):
        well(remote)
        server.hello = hello
        server.drop()
        with pytest.raises(DeadlineExceeded):
            remote.infer(BIG, deadline_ms=DEADLINE_MS)
        remote.close()
        assert len(remote._transport._client._wires) == 0


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n" * 4, b"HTTP/1.1 100 \r\nA: b\r\nC: d\r\n\r\n"])
def test_interim_replies_to_half_a_request_do_not_end_it(server, remote, interim):
    def hello(server, connection):
        connection.recv(1, socket.MSG_PEEK)
        connection.sendall(interim)

    well(remote)
    server.hello = hello
    server.drop()
    np.testing.assert_array_equal(remote.infer(BIG, deadline_ms=FOREVER_MS).outputs["y"], BIG * 2)


def test_work_whose_time_has_gone_is_not_sent(server, remote):
    well(remote)
    sent = len(server.asked)
    expired = Deadline(time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        remote.submit({"x": X}, expired).result(200)
    assert len(server.asked) == sent


def test_the_queue_and_the_threads_are_bounded(server):
    before = len(outrider_threads())
    with Remote(server.url, model="m", threads=2, queue_size=3) as remote:
        well(remote)
        server.infer = servers.silent
        now_s = 0.0
        deadline = Deadline(1000.0, clock=lambda: now_s)
        futures, refused = [], 0
        for _ in range(30):
            try:
                futures.append(remote.submit({"x": X}, deadline))
            except QueueFull:
                refused += 1
        assert 3 <= len(futures) <= 5 and refused == 30 - len(futures)
        assert len(outrider_threads()) - before <= 2
        now_s = 2000.0
        server.drop()  # wakes those that wait for their replies
        for future in futures:
            with pytest.raises((DeadlineExceeded, RemoteUnavailable)):
                future.result(LATE_S)
        server.infer = servers.good
        well(remote)
        assert len(outrider_threads()) - before <= 2


def test_many_faults_leave_no_threads_and_no_connections(server):
    before = threading.active_count()
    with Remote(server.url, model="m") as remote:
        well(remote)
        for _ in range(10):
            for fault in ("closes", "resets"):
                server.infer = BROKEN[fault]
                with pytest.raises(RemoteUnavailable):
                    ask(remote)
            server.infer = servers.says(http(b"", length=10**9))
            with pytest.raises(ReplyError):
                ask(remote)
        server.infer = servers.good
        well(remote)
        assert len(remote._transport._client._wires) <= 4
    # The server's own threads end with their connections. What earlier tests left may end meanwhile, nothing begins.
    until(lambda: threading.active_count() <= before + 1)


def test_a_closed_remote_does_not_connect(server):
    remote = Remote(server.url, model="m")
    remote.close()
    with pytest.raises(RunnerClosed):
        remote.connect(Deadline.after_ms(FOREVER_MS))
    assert server.connections == 0


def test_a_cancelled_request_is_not_sent(server):
    with Remote(server.url, model="m", threads=1) as remote:
        well(remote)
        let_go = threading.Event()

        def waits(server, connection, asked):
            assert let_go.wait(LATE_S)
            servers.good(server, connection, asked)

        server.infer = waits
        first, second = (remote.submit({"x": X}, Deadline.after_ms(FOREVER_MS)) for _ in range(2))
        assert second.cancel()
        let_go.set()
        assert first.result(LATE_S)
        sent = len(server.asked)
        server.infer = servers.good
        well(remote)
        assert len(server.asked) == sent + 1
