"""What comes whole goes a shorter way than through the application, and nobody can tell which way it went."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn

from outrider.endpoint.app import build_app
from outrider.endpoint.calls import access
from outrider.endpoint.inference import SOON_SENT_BYTES
from outrider.endpoint.intake import Intake
from outrider.endpoint.models import QUICK_MS, Models, Served
from outrider.endpoint.protocol import BoundedProtocol
from outrider_runtimes import oip
from outrider_runtimes.errors import InferenceError
from support.broker import wait_until
from support.endpoints import Named

TOKEN = "right"
BODY_BYTES = 1 << 20
QUEUE = 8
MODEL = "/v2/models/digits"


class Unhurried(BoundedProtocol):
    head_timeout_s = body_timeout_s = unread_timeout_s = read_timeout_s = 120.0
    linger_s = 0.5


class Serving:
    """An endpoint over one runner, and the address of its server."""

    def __init__(self, digits: Named, endpoint: Any, address: tuple[str, int]) -> None:
        self.digits, self.endpoint, self.address = digits, endpoint, address

    def answered(self) -> int:
        """How many requests were."""
        return sum(model["requests"] for model in self.endpoint.metrics.quality()["models"])

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=120)


@contextmanager
def serving(*, direct: bool = True, loop: str = "asyncio") -> Iterator[Serving]:
    digits = Named()
    app = build_app(
        Models([Served(name="digits", runner=digits)]),
        token=TOKEN,
        limits=oip.Limits(body_bytes=BODY_BYTES, json_bytes=BODY_BYTES),
        intake=Intake(queue=QUEUE, body_bytes=BODY_BYTES),
    )
    endpoint = app.state.endpoint
    endpoint.guard()  # nobody does, and nothing is stuck
    protocol = functools.partial(Unhurried, direct=endpoint.direct if direct else None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, http=protocol, ws="none", loop=loop, lifespan="off", log_config=None, server_header=False,
            date_header=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Serving(digits, endpoint, listener.getsockname())
        finally:
            digits.let_go()
            server.should_exit = True
            thread.join(120)
            assert not thread.is_alive()
            digits.close()


def request(body: bytes, *, target: str = f"{MODEL}/infer", token: str = TOKEN, **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), "Authorization": f"Bearer {token}", "X-Request-ID": "7"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"POST {target} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(*, binary: bool = False, rows: int = 1, value: float = 1.0, **changes: Any) -> bytes:
    message = oip.encode_request({"x": np.full((rows, 4), value, np.float32)}, id="a", binary=binary, **changes)
    return request(message.body, **message.headers)


def reply(connection: socket.socket) -> tuple[list[bytes], bytes]:
    """Its first line and its headers in some order, and its body."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1) or pytest.fail(f"closed after {head!r}")
    first, *fields = head.strip().split(b"\r\n")
    length, body = int(dict(field.split(b": ") for field in fields)[b"content-length"]), b""
    while len(body) < length:
        body += connection.recv(length - len(body)) or pytest.fail("closed")
    return [first, *sorted(fields)], body


CHUNKED = request(b"", Content_Length="0").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
JSON = oip.encode_request({"x": np.ones((1, 4), np.float32)}, binary=False).body
REQUESTS = {
    "JSON": asked(),
    "binary": asked(binary=True),
    "several rows": asked(rows=5),
    "a version": request(JSON, target=f"{MODEL}/versions/3/infer"),
    "chunks": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(JSON), JSON),
    "an output": asked(outputs=["logits"]),
    "an output that is not there": asked(outputs=["other"]),
    "time enough": asked(timeout_us=50_000_000),
    "not JSON": request(b"{"),
    "nothing": request(b""),
    "another input": request(JSON.replace(b'"x"', b'"y"')),
    "another shape": request(JSON.replace(b"[1,4]", b"[4]")),
    "too large a shape": request(JSON.replace(b"[1,4]", b"[900000,4]")),
    "not finite": asked(binary=True, value=np.nan),
    "an answer that is not finite": asked(value=3e38, outputs=["logits"]),
    "another model": request(JSON, target="/v2/models/other/infer"),
    "another version": request(JSON, target=f"{MODEL}/versions/4/infer"),
    "a target with a query": request(JSON, target=f"{MODEL}/infer?a=b"),
    "no token": request(JSON, token="wrong"),
    "compressed": request(JSON, Content_Encoding="gzip"),
    "a length of its JSON that it has not": request(JSON, Inference_Header_Content_Length="100000"),
    "no number of bytes": request(JSON, Inference_Header_Content_Length="x"),
    "a body that is too long": request(b"0" * (BODY_BYTES + 1)),
    "its own id": request(JSON, X_Request_ID="mine.1"),
}
UNTIMED = ("infer_ms", "queue_ms")


def untimed(body: bytes) -> Any:
    """A reply's document, without the times in it, and what follows it."""
    document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    document["parameters"] = {k: v for k, v in document.get("parameters", {}).items() if k not in UNTIMED}
    return document, body[end:]


def all_replied(*, direct: bool, quick: bool, caplog: pytest.LogCaptureFixture) -> tuple[Any, Any, Any]:
    """The replies, the counts and the lines of the access log, without times and lengths that they change."""
    caplog.clear()
    replies = {}
    with serving(direct=direct) as served, caplog.at_level("INFO", logger=access.name):
        served.digits.expected_ms = QUICK_MS if quick else None
        served.digits.gain = np.float32(2.0)
        for name, sent in REQUESTS.items():
            with served.connect() as connection:
                connection.sendall(sent)
                head, body = reply(connection)
                head = [line for line in head if b"content-length" not in line or head[0][9:12] != b"200"]
                replies[name] = head, untimed(body)
        lines = [record for record in caplog.records if record.name == access.name]
        wait_until(lambda: len([r for r in caplog.records if r.name == access.name]) == len(REQUESTS))
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == access.name]
        wait_until(lambda: served.endpoint.intake.inside() == served.endpoint.intake.queued("digits") == 0)
        assert served.endpoint.intake.held_bytes == 0
        models = served.endpoint.metrics.quality()["models"]
    counted = sorted((m["model"], m["version"], r["reason"], r["requests"]) for m in models for r in m["reasons"])
    kept = ("request_id", "client", "method", "path", "status", "reason", "model", "version")
    return replies, counted, [[line[key] for key in kept] for line in lines]


@pytest.mark.parametrize("quick", [False, True])
def test_replies_counts_and_log_are_those_of_the_application(caplog: pytest.LogCaptureFixture, quick: bool) -> None:
    replies, counted, logged = all_replied(direct=True, quick=quick, caplog=caplog)
    statuses = {name: int(head[0].split()[1]) for name, (head, _) in replies.items()}
    assert statuses["JSON"] == statuses["chunks"] == statuses["a version"] == 200
    assert sorted(set(statuses.values())) == [200, 400, 401, 404, 413, 415, 500]
    for found, expected in zip(
        (replies, counted, logged), all_replied(direct=False, quick=quick, caplog=caplog), strict=True
    ):
        assert found == expected


@pytest.fixture(params=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(loop=request.param) as served:
        yield served


def test_what_comes_in_pieces_is_answered_too(served: Serving) -> None:
    sent = asked(binary=True, rows=7)
    with served.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = sent.index(b"\r\n\r\n") + 4
        for at in (5, body - 2, body, body + 1, len(sent) - 3):
            connection.sendall(sent[:at])
            inside = int(at >= body)  # a request whose head is here
            wait_until(functools.partial(lambda inside: served.endpoint.intake.inside() == inside, inside))
            connection.sendall(sent[at:])
            assert reply(connection)[0][0] == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("quick", [False, True])
def test_requests_sent_ahead_are_answered_in_their_order(served: Serving, quick: bool) -> None:
    served.digits.expected_ms = QUICK_MS if quick else None
    numbers = list(range(QUEUE))
    with served.connect() as connection:
        connection.sendall(b"".join(asked(value=float(number)) for number in numbers))
        got = b""
        while got.count(b'"outputs"') < len(numbers) or not got.endswith(b"]}]}"):
            got += connection.recv(65536) or pytest.fail("closed")
    replies = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in got.split(b"HTTP/1.1 200 OK")[1:]]
    assert [each["outputs"][0]["data"][0] for each in replies] == numbers


def test_of_many_requests_in_one_piece_as_many_are_answered_as_may_wait(served: Serving) -> None:
    """Or one caller would keep all others waiting for as long as the answers to a whole read take."""
    served.digits.expected_ms = QUICK_MS
    with served.connect() as connection:
        connection.sendall(asked() * (6 * QUEUE))
        statuses = [reply(connection)[0][0].split()[1] for _ in range(6 * QUEUE)]
    assert statuses[:QUEUE] == [b"200"] * QUEUE and set(statuses[QUEUE:]) == {b"429"}


def test_of_what_is_there_in_one_turn_as_much_is_answered_as_may_wait(served: Serving) -> None:
    """A quick model has no queue that could be full, and a loop that answers all that comes would be late for all."""
    served.digits.expected_ms = QUICK_MS
    entered, go = threading.Event(), threading.Event()

    def stop_the_loop() -> None:
        entered.set()
        assert go.wait(120)

    served.digits.during_here = stop_the_loop
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(21)]
        for connection in others:  # all are known to the loop
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert reply(connection)[0][0] == b"HTTP/1.1 200 OK"
        first.sendall(asked())
        assert entered.wait(120)
        served.digits.during_here = lambda: None
        for connection in others:
            connection.sendall(asked())
        go.set()
        statuses = [reply(connection)[0][0].split()[1] for connection in (first, *others)]
        assert (statuses.count(b"200"), statuses.count(b"429")) == (1 + QUEUE, len(others) - QUEUE)
        others[0].sendall(asked())
        assert reply(others[0])[0][0] == b"HTTP/1.1 200 OK"
    wait_until(lambda: served.endpoint.intake.queued("digits") == 0)


def test_a_caller_who_hangs_up_while_it_waits_is_not_computed_for(served: Serving) -> None:
    served.digits.hold()
    with served.connect() as first, served.connect() as second:
        first.sendall(asked())
        wait_until(lambda: served.digits.submitted == 1)
        second.sendall(asked())
        wait_until(lambda: served.digits.submitted == 2)
    wait_until(lambda: served.endpoint.intake.inside() == 0)
    served.digits.let_go()
    (digits,) = [m for m in served.endpoint.metrics.quality()["models"] if m["model"] == "digits"]
    assert [(r["reason"], r["requests"]) for r in digits["reasons"]] == [("gone", 2)]


def test_a_reply_that_nobody_reads_counts_as_bytes_inside_until_it_is_read(served: Serving) -> None:
    """One that came whole: its request is short beside it."""
    intake = served.endpoint.intake
    rows = 3000  # 48 kB; as text it is more than twice as long
    x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    message = oip.encode_request({"x": x}, binary=True)
    body = message.body.replace(b'"binary_data_output":true', b'"binary_data_output":false')
    headers = message.headers | {oip.LENGTH_HEADER: str(message.json_bytes + 1)}
    sent = request(body, **headers)
    with served.connect() as connection:
        asked_times = 0
        while intake.held_bytes <= SOON_SENT_BYTES:  # the kernel takes some of them
            connection.sendall(sent)
            asked_times += 1
            wait_until(functools.partial(lambda times: served.answered() == times, asked_times))
            wait_until(lambda: intake.held_bytes == 0 or intake.held_bytes > SOON_SENT_BYTES)
        for _ in range(asked_times):
            head, got = reply(connection)
            assert head[0] == b"HTTP/1.1 200 OK"
            assert len(json.loads(got)["outputs"][0]["data"]) == 4 * rows
    wait_until(lambda: intake.held_bytes == 0)


@pytest.mark.parametrize("quick", [False, True])
def test_time_that_has_passed_is_504(served: Serving, quick: bool) -> None:
    """Which of the two that look at the clock sees it first is nobody's business."""
    served.digits.expected_ms = QUICK_MS if quick else None
    with served.connect() as connection:
        connection.sendall(asked(timeout_us=1))
        assert reply(connection)[0][0].startswith(b"HTTP/1.1 504 ")
    wait_until(lambda: served.endpoint.intake.inside() == 0)


def test_what_the_engine_fails_on_is_500_and_the_next_one_is_answered(served: Serving) -> None:
    served.digits.error = lambda: InferenceError("a node failed")
    with served.connect() as connection:
        connection.sendall(asked())
        assert reply(connection)[0][0].startswith(b"HTTP/1.1 500 ")
        served.digits.error = None
        connection.sendall(asked())
        assert reply(connection)[0][0] == b"HTTP/1.1 200 OK"


def test_a_fault_of_ours_is_500_and_logged(
    served: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(oip, "encode_reply", lambda *_, **__: 1 / 0)
    with served.connect() as connection, caplog.at_level(logging.ERROR):
        connection.sendall(asked())
        head, body = reply(connection)
    assert head[0].startswith(b"HTTP/1.1 500 ") and json.loads(body)["error"] == "internal error"
    assert "ZeroDivisionError" in caplog.text
    wait_until(lambda: served.endpoint.intake.inside() == served.endpoint.intake.queued("digits") == 0)


def test_what_waits_when_the_endpoint_is_stopped_is_answered_and_its_connection_closed(served: Serving) -> None:
    served.digits.hold()
    with served.connect() as connection:
        connection.sendall(asked())
        wait_until(lambda: served.digits.submitted == 1)
        served.endpoint.intake.stop()
        served.digits.let_go()
        head, _ = reply(connection)
        assert head[0] == b"HTTP/1.1 200 OK" and b"connection: close" in head
        assert connection.recv(1) == b""
