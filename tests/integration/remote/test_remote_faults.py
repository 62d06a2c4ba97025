"""Remote against servers that answer late, broken or wrong: typed errors by the deadline, then right answers."""

from __future__ import annotations

import json
import time

import pytest

from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    DeadlineExceeded,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
)
from outrider_runtimes.remote import Remote
from support import servers
from support.hostile import BROKEN, CHUNKED, LATE, OK_HEAD, WRONG
from support.remotes import DEADLINE_MS, FOREVER_MS, LATE_S, X, ask, well
from support.servers import http


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


def test_another_bundle_is_noticed_and_the_interface_asked_for_again(server, remote):
    well(remote)
    server.ours = {"bundle": "d" * 64, "variant": "w"}
    with pytest.raises(ReplyError, match="another bundle"):
        ask(remote)
    well(remote)
    assert (remote.bundle, remote.variant) == ("d" * 64, "w")


def test_an_endpoint_that_always_names_another_bundle_is_asked_for_it_once_a_second(server):
    now = [100.0]
    others = (f"{n:064x}" for n in range(1000))

    def changes(server, connection, asked):
        servers.answers({"y": X * 2}, bundle=next(others))(server, connection, asked)

    def asks(times: int) -> int:
        for _ in range(times):
            with pytest.raises(ReplyError, match="another bundle"):
                ask(remote)
        return sum(asked.path == "/v2/models/m" for asked in server.asked)

    with Remote(server.url, model="m", clock=lambda: now[0]) as remote:
        well(remote)
        server.infer = changes
        assert asks(10) == 2
        now[0] += 0.99
        assert asks(10) == 2
        now[0] += 0.02
        assert asks(10) == 3
        server.infer = servers.good
        well(remote)


def test_metadata_that_there_is_no_time_to_decode_is_late(server):
    """The deadline's clock stands still, and moves when the metadata is sent."""
    now = [0.0]
    pad = ',"pad":[' + ",".join(["[]"] * 250_000) + "]}"

    def heavy(server, connection, asked):
        document = oip.model_metadata("m", servers.INTERFACE, versions=[1], platform="raw", parameters={})
        body = (json.dumps(document)[:-1] + pad).encode()
        now[0] += 29.5
        connection.sendall(http(body))

    server.metadata = heavy
    with Remote(server.url, model="m") as remote:
        with pytest.raises(DeadlineExceeded, match="to decode its 7"):
            remote.connect(Deadline(59.5, clock=lambda: now[0]))
        assert [spec.name for spec in remote.connect(Deadline.after_ms(FOREVER_MS)).inputs] == ["x"]


def test_a_reply_that_there_is_no_time_to_decode_is_late(server, remote):
    well(remote)
    server.infer = servers.says(http(b"{" + b" " * 12_000_000 + b"}"))
    with pytest.raises(DeadlineExceeded):
        ask(remote, 1000.0)
    server.infer = servers.good
    well(remote)
