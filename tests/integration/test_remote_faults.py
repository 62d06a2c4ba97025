"""Remote against servers that misbehave on real sockets: typed errors by the deadline, and the next good call works."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest

from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InputError,
    InterfaceMismatch,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.remote import Remote
from support import servers
from support.servers import Server, http

X = np.float32([[1.0, 2.0], [3.0, 4.0]])
DEADLINE_MS = 200.0
# A generous bound: what is promised is the deadline, what is tested here is that nothing waits for a server.
LATE_S = 1.0
FOREVER_MS = 30_000.0


def ask(remote: Remote, milliseconds: float = FOREVER_MS) -> np.ndarray:
    """The answer's `y`; waits a little longer than the deadline, so that a late future shows."""
    future = remote.submit({"x": X}, Deadline.after_ms(milliseconds))
    try:
        return future.result(milliseconds / 1000.0 + LATE_S).outputs["y"]
    except DeadlineExceeded:
        raise
    except FutureTimeout:
        pytest.fail("the future did not end by its deadline")


def well(remote: Remote) -> None:
    np.testing.assert_array_equal(ask(remote), X * 2)


def outrider_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("outrider-remote")]


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def remote(server):
    with Remote(server.url, model="m") as remote:
        yield remote


def test_a_good_server_is_answered_in_binary(server, remote):
    well(remote)
    well(remote)
    assert [a.path for a in server.asked] == ["/v2", "/v2/models/m", "/v2/models/m/infer", "/v2/models/m/infer"]
    assert server.connections == 1
    request = server.asked[-1].decoded()
    assert request.binary and 0 < request.timeout_us <= FOREVER_MS * 1000
    assert "accept-encoding" not in server.asked[-1].headers
    assert (remote.bundle, remote.variant, remote.interface) == ("b" * 64, "v", servers.INTERFACE)
    assert remote.interface_digest == servers.INTERFACE.digest


def test_json_where_the_server_lacks_the_extension():
    with Server(extensions=()) as server, Remote(server.url, model="m") as remote:
        well(remote)
        assert "binary_data_size" not in server.asked[-1].body.decode()


def test_a_foreign_server_has_the_interface_of_its_metadata():
    with Server(ours={}) as server, Remote(server.url, model="m") as remote:
        well(remote)
        assert (remote.bundle, remote.variant) == ("", "")
        assert remote.interface.inputs[0].shape == (None, 2)


def test_timing_says_where_the_time_went(remote):
    answer = remote.submit({"x": X}, Deadline.after_ms(None)).result(30)
    timing = answer.timing_ms
    assert timing.infer == 0.001  # what the server says whatever it took, so less than any round trip
    assert 0 < timing.network < timing.total
    assert timing.queue + timing.pre + timing.network + timing.post <= timing.total
    assert remote.estimate_ms() == pytest.approx(timing.total)


def test_nothing_is_known_before_the_first_request(remote):
    assert remote.estimate_ms() is None
    for name in ("interface", "interface_digest", "bundle", "variant"):
        with pytest.raises(RemoteUnavailable, match="not known yet"):
            getattr(remote, name)
    assert remote.connect(Deadline.after_ms(FOREVER_MS)) == servers.INTERFACE
    assert remote.interface == servers.INTERFACE


def test_wrong_inputs_are_refused_here(server, remote):
    with pytest.raises(InputError, match="'x'"):
        remote.submit({"x": X.astype(np.float64)}, Deadline.after_ms(FOREVER_MS)).result(30)
    sent = len(server.asked)
    with pytest.raises(InputError, match="'x'"):
        remote.submit({"x": X[0]}, Deadline.after_ms(FOREVER_MS))
    assert len(server.asked) == sent
    well(remote)


OK_HEAD = b"HTTP/1.1 200 OK\r\n"
DRIP_BODY = http(b"{" + b" " * 10_000)

LATE = {
    "drips its status line": servers.drips(b"HTTP/1.1 200 OK" + b"K" * 10_000),
    "drips its headers": servers.drips(OK_HEAD + b"X: " + b"x" * 10_000),
    "drips its body": servers.drips(DRIP_BODY),
    "drips chunks": servers.drips(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 5000),
    "drips 100 Continue": servers.drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "says nothing": servers.silent,
    "stops in the head": servers.says(OK_HEAD),
    "stops in the body": servers.says(http(b"{", length=100)),
}

CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BROKEN = {
    "resets": servers.resets,
    "closes": servers.says_and_closes(b""),
    "closes in the head": servers.says_and_closes(OK_HEAD),
    "closes in the body": servers.says_and_closes(http(b"{", length=100)),
    "closes in a chunk": servers.says_and_closes(CHUNKED + b"5\r\nab"),
}

WRONG = {
    "endless 100 Continue": servers.endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless headers": servers.endless(OK_HEAD + b"X: y\r\n" * 1000),
    "endless header": servers.endless(b"x" * 10_000),
    "1000 headers": servers.says(OK_HEAD + b"X: y\r\n" * 1000 + b"\r\n"),
    "101 Switching Protocols": servers.says(b"HTTP/1.1 101 Switching\r\n\r\n"),
    "not HTTP": servers.says(b"SSH-2.0-OpenSSH_9\r\n\r\n"),
    "HTTP/2": servers.says(b"HTTP/2 200\r\n\r\n"),
    "folded header": servers.says(OK_HEAD + b"A: b\r\n c\r\n\r\n"),
    "header without a colon": servers.says(OK_HEAD + b"A\r\n\r\n"),
    "two lengths": servers.says(OK_HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
    "length and chunks": servers.says(OK_HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"),
    "negative length": servers.says(OK_HEAD + b"Content-Length: -1\r\n\r\n"),
    "a gigabyte announced": servers.says(http(b"", length=10**9)),
    "10^30 bytes announced": servers.says(http(b"", length=10**30)),
    "a chunk of 10^12": servers.says(CHUNKED + b"e8d4a51000\r\n"),
    "a chunk of x": servers.says(CHUNKED + b"x\r\n"),
    "an endless chunk length": servers.says(CHUNKED + b"0" * 1000),
    "a chunk longer than it says": servers.says(CHUNKED + b"2\r\nabc\r\n0\r\n\r\n"),
    "gzip": servers.says(http(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")),
    "no JSON": servers.says(http(b"<html>")),
    "an empty body": servers.says(http(b"")),
    "a list": servers.says(http(b"[]")),
    "deep JSON": servers.says(http(b"[" * 100_000 + b"]" * 100_000)),
    "no outputs": servers.altered(outputs=None),
    "no id": servers.altered(id=None),
    "another id": servers.altered(id="0"),
    "another name": servers.altered_output(name="z"),
    "another datatype": servers.altered_output(datatype="FP64"),
    "BYTES": servers.altered_output(datatype="BYTES", data=["a"] * 4),
    "another shape": servers.altered_output(shape=[4, 1]),
    "another N": servers.answers({"y": np.zeros((1, 2), np.float32)}),
    "another rank": servers.answers({"y": np.zeros((2, 2, 1), np.float32)}),
    "too few elements": servers.altered_output(data=[1.0]),
    "a huge shape": servers.altered_output(shape=[2**30, 2**30]),
    "text": servers.altered_output(data=["1", "2", "3", "4"]),
    "an output more": servers.answers({"y": X, "z": X}),
    "NaN": servers.answers({"y": np.full((2, 2), np.nan, np.float32)}),
    "infinity": servers.answers({"y": np.full((2, 2), np.inf, np.float32)}),
    "NaN in JSON": servers.says(http(b'{"id": "1", "outputs": [{"name": "y", "data": [NaN]}]}')),
    "a lying header length": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: 900\r\n")),
    "a negative header length": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: -1\r\n")),
    "header length 0": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: 0\r\n")),
    "another bundle": servers.answers({"y": X * 2}, bundle="c" * 64),
}


def truncated(server: Server, connection: socket.socket, asked: servers.Asked) -> None:
    """The right reply without its last four bytes, under a length that is right for that."""
    message = servers.right_reply(server, asked)
    connection.sendall(servers.sent(oip.Message(body=message.body[:-4], json_bytes=message.json_bytes)))


WRONG["truncated binary"] = truncated


@pytest.mark.parametrize("fault", LATE)
def test_what_is_too_slow_ends_by_the_deadline(server, remote, fault):
    well(remote)
    server.infer = LATE[fault]
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ask(remote, DEADLINE_MS)
    assert time.monotonic() - begun_s < DEADLINE_MS / 1000 + LATE_S
    assert remote.estimate_ms() > 0
    server.infer = servers.good
    well(remote)


@pytest.mark.parametrize("fault", BROKEN)
def test_what_breaks_is_unavailable(server, remote, fault):
    well(remote)
    server.infer = BROKEN[fault]
    with pytest.raises(RemoteUnavailable, match=f"127.0.0.1:{server.port}|before its reply"):
        ask(remote)
    server.infer = servers.good
    well(remote)


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_a_reply_error(server, remote, fault):
    well(remote)
    server.infer = WRONG[fault]
    with pytest.raises(ReplyError):
        ask(remote)
    server.infer = servers.good
    well(remote)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        ("400 Bad Request", b'{"error": "input \'x\' is wrong"}', "input 'x' is wrong"),
        ("500 Internal Server Error", b"<html>" * 10, "status 500"),
        ("503 Service Unavailable", b"", "status 503"),
        ("503 No", b'{"error": "a\\u001b[31m\\nb"}', "a \\[31m b"),
        ("500 No", json.dumps({"error": "x" * 5000}).encode(), "x{300}$"),
        ("500 No", b'{"error": 5}', "status 500"),
        ("302 Found", b"", "status 302"),
        ("204 No Content", b"", "status 204"),
    ],
)
def test_an_error_status_is_refused_with_what_it_says(server, remote, status, body, says):
    well(remote)
    server.infer = servers.says(http(body, status=status, headers="Location: http://127.0.0.1:1/\r\n"))
    with pytest.raises(RemoteRefused, match=says) as caught:
        ask(remote)
    assert caught.value.status == int(status[:3])
    server.infer = servers.good
    well(remote)


def test_an_error_with_a_gigabyte_to_say_is_still_that_error(server, remote):
    well(remote)
    server.infer = servers.says(http(b"", status="500 No", length=10**9))
    with pytest.raises(RemoteRefused, match="status 500"):
        ask(remote)
    server.infer = servers.endless(b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 100_000)
    with pytest.raises(RemoteRefused, match="status 500"):
        ask(remote)
    server.infer = servers.good
    well(remote)


def test_a_reply_longer_than_asked_for_is_refused(server):
    with Remote(server.url, model="m", max_reply_bytes=1000) as remote:
        well(remote)
        for bad in (
            http(b" " * 1001),
            CHUNKED + b"300\r\n" + b" " * 0x300 + b"\r\n100\r\n",
            OK_HEAD + b"\r\n" + b" " * 1001,
        ):
            server.infer = servers.says(bad)
            with pytest.raises(ReplyError, match="more than 1000 bytes"):
                ask(remote)
        server.infer = servers.good
        well(remote)


def test_chunks_and_replies_that_end_with_the_connection_are_read(server, remote):
    def chunked(server, connection, asked):
        message = servers.right_reply(server, asked)
        head = OK_HEAD + f"{oip.LENGTH_HEADER}: {message.json_bytes}\r\nTransfer-Encoding: Chunked\r\n\r\n".encode()
        parts = [message.body[at : at + 7] for at in range(0, len(message.body), 7)]
        chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in parts)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + head + chunks + b"0\r\nTrailer: x\r\n\r\n")

    def until_closed(server, connection, asked):
        message = servers.right_reply(server, asked)
        head = f"HTTP/1.0 200 OK\r\n{oip.LENGTH_HEADER}: {message.json_bytes}\r\n\r\n".encode()
        servers.says_and_closes(head + message.body)(server, connection, asked)

    for behave in (chunked, until_closed, chunked):
        server.infer = behave
        well(remote)


METADATA_FAULTS = {
    "404": (servers.says(http(b'{"error": "there is no model"}', status="404 Not Found")), RemoteRefused),
    "no JSON": (servers.says(http(b"hello")), ReplyError),
    "no tensors": (servers.says(http(b"{}")), ReplyError),
    "too long": (servers.says(http(b" " * (2 << 20))), ReplyError),
    "silent": (servers.silent, DeadlineExceeded),
    "reset": (servers.resets, RemoteUnavailable),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_bad_metadata_is_typed_and_asked_for_again(server, remote, fault):
    server.metadata, error = METADATA_FAULTS[fault]
    with pytest.raises(error):
        ask(remote, DEADLINE_MS if error is DeadlineExceeded else FOREVER_MS)
    with pytest.raises(error):
        remote.connect(Deadline.after_ms(DEADLINE_MS if error is DeadlineExceeded else FOREVER_MS))
    server.metadata = None
    well(remote)


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
                future.result(LATE_S * 5)
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
            remote.submit({"x": big}, Deadline.after_ms(FOREVER_MS)).result(30)


def test_another_bundle_is_noticed_and_the_interface_asked_for_again(server, remote):
    well(remote)
    server.ours = {"bundle": "d" * 64, "variant": "w"}
    with pytest.raises(ReplyError, match="another bundle"):
        ask(remote)
    well(remote)
    assert (remote.bundle, remote.variant) == ("d" * 64, "w")


def test_another_interface_is_a_mismatch(server, remote):
    well(remote)
    other = servers.INTERFACE.to_dict() | {"labels": ["a", "b"]}
    digest = oip.Interface.from_dict(other).digest
    server.ours = {"bundle": "d" * 64, "interface": other, "interface_digest": digest}
    with pytest.raises(ReplyError):
        ask(remote)
    with pytest.raises(InterfaceMismatch):
        ask(remote)
    assert remote.interface_digest == digest
    well(remote)


def test_a_reply_that_there_is_no_time_to_decode_is_late(server, remote):
    well(remote)
    server.infer = servers.says(http(b"{" + b" " * 12_000_000 + b"}"))
    with pytest.raises(DeadlineExceeded):
        ask(remote, 1000.0)
    server.infer = servers.good
    well(remote)


def test_work_whose_time_has_gone_is_not_sent(server, remote):
    well(remote)
    sent = len(server.asked)
    expired = Deadline(time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        remote.submit({"x": X}, expired).result(30)
    assert len(server.asked) == sent


def test_the_queue_and_the_threads_are_bounded(server):
    before = len(outrider_threads())
    with Remote(server.url, model="m", threads=2, queue_size=3) as remote:
        well(remote)
        server.infer = servers.silent
        deadline = Deadline.after_ms(1000)
        futures, refused = [], 0
        for _ in range(30):
            try:
                futures.append(remote.submit({"x": X}, deadline))
            except QueueFull:
                refused += 1
        assert 3 <= len(futures) <= 5 and refused == 30 - len(futures)
        assert len(outrider_threads()) - before <= 2
        for future in futures:
            with pytest.raises(DeadlineExceeded):
                future.result(5)
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
        assert len(remote._client._wires) <= 4
    deadline_s = time.monotonic() + 10
    # The server's own threads end with their connections.
    while threading.active_count() > before + 1 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("milliseconds", [FOREVER_MS, None])
def test_close_wakes_what_waits(server, milliseconds):
    remote = Remote(server.url, model="m", threads=2, queue_size=4)
    well(remote)
    server.infer = servers.silent
    sent = len(server.asked)
    futures = [remote.submit({"x": X}, Deadline.after_ms(milliseconds)) for _ in range(4)]
    deadline_s = time.monotonic() + 10
    while len(server.asked) < sent + 2 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    remote.close()
    for future in futures:
        with pytest.raises(RunnerClosed):
            future.result(5)
    with pytest.raises(RunnerClosed):
        remote.submit({"x": X}, Deadline.after_ms(FOREVER_MS))
    remote.close()


def test_a_closed_remote_does_not_connect(server):
    remote = Remote(server.url, model="m")
    remote.close()
    with pytest.raises(RunnerClosed):
        remote.connect(Deadline.after_ms(FOREVER_MS))
    assert server.connections == 0


def test_a_cancelled_request_is_not_sent(server):
    with Remote(server.url, model="m", threads=1) as remote:
        well(remote)
        server.infer = servers.silent
        first = remote.submit({"x": X}, Deadline.after_ms(500))
        second = remote.submit({"x": X}, Deadline.after_ms(FOREVER_MS))
        assert second.cancel()
        with pytest.raises(DeadlineExceeded):
            first.result(5)
        sent = len(server.asked)
        server.infer = servers.good
        well(remote)
        assert len(server.asked) == sent + 1


def test_several_callers_share_one_remote(server, remote):
    wrong: list[object] = []

    def caller(number: int) -> None:
        x = np.full((1, 2), number, np.float32)
        for _ in range(20):
            answer = remote.submit({"x": x}, Deadline.after_ms(FOREVER_MS)).result(30)
            if not np.array_equal(answer.outputs["y"], x * 2):
                wrong.append(number)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert server.connections <= 4


@pytest.mark.parametrize(
    ("url", "options", "match"),
    [
        ("ftp://host", {}, "not the URL"),
        ("host:8000", {}, "not the URL"),
        ("http://", {}, "not the URL"),
        ("http://host:port", {}, "not a URL"),
        ("http://host:99999", {}, "not a URL"),
        ("http://user:secret@host", {}, "no user"),
        ("http://host?x=1", {}, "no user, query"),
        ("http://host/a b", {}, "characters"),
        ("http://host\r\nX: y", {}, "is not a URL"),
        ("http://host/\r\nX:y", {}, "characters"),
        ("http://user:secret@host:port", {}, "not a URL"),
        ("ftp://user:secret@host", {}, "no user"),
        ("http://höst", {}, "characters"),
        ("http://host", {"model": ""}, "name of a model"),
        ("http://host", {"model": ".."}, "name of a model"),
        ("http://host", {"token": "secret"}, "in the clear"),
        ("http://127.0.0.1", {"token": "a\r\nb"}, "one word"),
        ("http://127.0.0.1", {"token": ""}, "one word"),
        ("http://host", {"threads": 0}, "threads is 0"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_named(url, options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        Remote(url, **{"model": "m"} | options)
    assert "secret" not in str(caught.value)


def test_a_token_goes_to_this_machine_and_model_names_are_quoted(server):
    with Remote(server.url + "/under/", model="../a b?", token="s3cret") as remote:
        ask(remote)
    assert server.asked[-1].path == "/under/v2/models/..%2Fa%20b%3F/infer"
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer s3cret"}
