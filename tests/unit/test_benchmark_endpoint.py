"""The load generator against a real server that counts, and what is made of its rates."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from benchmarks.endpoint import PLAIN_BINARY, PLAIN_JSON, TWIN, answer_of, compared
from benchmarks.load import Loaded, post, run_load
from benchmarks.shown import endpoint, ray_serve

from outrider_runtimes import oip


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(body)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen, made.daemon_threads = [], True
        made.handle_error = lambda *_: None  # the clients leave in the middle of a request
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        Handler.status = 200


def load(server: http.server.ThreadingHTTPServer, **options: object) -> Loaded:
    request = post("/v2/models/m/infer", b"x" * 3000, {"X-More": "1"})
    settings = {"clients": 3, "seconds": 0.2, "warm_up_s": 0.05, "check": lambda reply: None} | options
    return run_load(server.server_address[1], request, **settings)


def test_it_counts_replies_and_hands_the_last_one_to_the_check(server: http.server.ThreadingHTTPServer) -> None:
    last: list[bytes] = []
    found = load(server, check=last.append)
    assert 0 < found.rate_per_s * 0.2 <= len(server.seen) and found.failed == 0
    assert set(server.seen) == {b"x" * 3000} and last[0].endswith(b"x" * 3000)
    assert 0.0 < found.p50_ms <= found.p99_ms and found.own_share > 0.0


def test_another_status_is_a_failure_and_no_reply(server: http.server.ThreadingHTTPServer) -> None:
    Handler.status = 503
    with pytest.raises(RuntimeError, match=r"no reply with status 200: b'HTTP/1.1 503"):
        load(server)


def test_a_wrong_answer_is_not_measured(server: http.server.ThreadingHTTPServer) -> None:
    def refuse(reply: bytes) -> None:
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        load(server, check=refuse)


@pytest.mark.parametrize("binary", [True, False])
def test_an_answer_is_read_in_both_forms(binary: bool) -> None:
    y = np.float32([[1.5, -2.0]])
    asked = oip.Request(id="1", inputs={}, binary=binary)
    message = oip.encode_reply({"y": y}, model="m", version="1", request=asked, parameters={})
    head = "".join(f"{name}: {value}\r\n" for name, value in message.headers.items())
    reply = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + message.body
    np.testing.assert_array_equal(answer_of(reply), y)


def rated(*rates: float) -> list[Loaded]:
    return [Loaded(rate_per_s=rate, p50_ms=1.0, p99_ms=2.0, failed=0, own_share=0.1) for rate in rates]


def test_rates_are_compared_round_by_round_and_the_twin_says_whether_they_mean_anything() -> None:
    loads = {"ours, JSON": rated(200, 100, 300), TWIN: rated(200, 101, 300), "peer": rated(100, 50, 150)}
    found = compared(loads, base="peer", twin=(TWIN, "ours, JSON"))
    assert found["ratios"]["ours, JSON"]["value"] == pytest.approx(2.0) and found["valid"]
    assert set(found["ratios"]) == {"ours, JSON"} and found["rate_per_s"]["peer"] == 100
    noisy = {**loads, TWIN: rated(300, 150, 450)}
    assert not compared(noisy, base="peer", twin=(TWIN, "ours, JSON"))["valid"]


def test_the_tables_name_what_was_missed() -> None:
    ours = ("ours, JSON", TWIN, "ours unbatched, JSON", "ours, binary")
    rows = {name: rated(300, 300) for name in (*ours, PLAIN_JSON, PLAIN_BINARY, "MLServer, JSON")}
    beside = {"mlserver": "1", **compared(rows, base="MLServer, JSON", twin=(TWIN, "ours, JSON"))}
    promise = {"promise": "twice as fast", "asked": 2.0, "measured": 1.0, "met": False}
    gain = {"plan": "up to 8 rows", "ratio": {"value": 3.0}, "valid": True}
    networks = {name: beside | {"network": f"{name} network"} for name in ("small", "image")}
    text = endpoint({"clients": 16, "beside": networks, "batching": {"MLP": gain}, "promises": [promise]})
    assert "| small network |" in text and "| image network |" in text
    assert "| MLP | up to 8 rows | 3.00 |" in text and text.endswith("- missed: twice as fast: 1, 2 was asked")
    ray = ray_serve({"modes": {"Ray's proxy": beside}, "promises": [promise | {"met": True}]})
    assert "| Ray's proxy | 300 | 300 | 1.00 |" in ray and "missed" not in ray
