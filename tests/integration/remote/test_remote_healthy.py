"""Remote against a server that does as it should: what is sent, what is known, what is refused before it is sent."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    InputError,
    RemoteUnavailable,
)
from outrider_runtimes.remote import Remote
from support import servers
from support.hostile import OK_HEAD
from support.remotes import FOREVER_MS, X, ask, well
from support.servers import Server


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
    answer = remote.submit({"x": X}, Deadline.after_ms(None)).result(200)
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
        remote.submit({"x": X.astype(np.float64)}, Deadline.after_ms(FOREVER_MS)).result(200)
    sent = len(server.asked)
    with pytest.raises(InputError, match="'x'"):
        remote.submit({"x": X[0]}, Deadline.after_ms(FOREVER_MS))
    assert len(server.asked) == sent
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


def test_several_callers_share_one_remote(server, remote):
    wrong: list[object] = []

    def caller(number: int) -> None:
        x = np.full((1, 2), number, np.float32)
        for _ in range(20):
            answer = remote.submit({"x": x}, Deadline.after_ms(FOREVER_MS)).result(200)
            if not np.array_equal(answer.outputs["y"], x * 2):
                wrong.append(number)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
        ("http://host", {"queue_size": 1.5}, "queue_size is 1.5"),
        ("http://host", {"max_reply_bytes": ""}, "max_reply_bytes is ''"),
        ("http://host", {"max_reply_bytes": -1}, "max_reply_bytes is -1"),
        ("http://host", {"retries": True}, "retries is True"),
        (None, {}, "url is None"),
        (b"http://host", {}, "url is b'http"),
        ("http://host", {"model": None}, "model is None"),
        ("http://host", {"model": b"m"}, "model is b'm'"),
        ("http://host", {"model": "\ud800"}, "name of a model"),
        ("http://127.0.0.1", {"token": b"secret"}, "one word"),
        ("http://127.0.0.1", {"token": 5}, "one word"),
        ("http://host", {"interface": servers.INTERFACE, "mapping": [("x", "a")]}, "mapping is"),
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
