"""The open loops of the overload benchmark, and what of their figures is a promise kept. No time decides anything."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from benchmarks import shown
from benchmarks.arrivals import arrivals_s, call_openly, post_openly
from benchmarks.load import post
from benchmarks.overload import promises

BODY = b"x" * 400_000  # more than a socket's buffer takes at once
PATIENCE_S = 60.0


class Scripted(socketserver.ThreadingTCPServer):
    """Answers the requests of this process by a script, whatever they say; counts them."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512
    script: ClassVar[list[str]] = []
    seen = 0
    lock = threading.Lock()

    def next(self) -> str:
        with self.lock:
            self.seen += 1
            return self.script[(self.seen - 1) % len(self.script)]


class Handler(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        while self.rfile.readline():
            length = 0
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            word = self.server.next()
            if word == "early":  # refused with the body unread, and the connection closed
                self.wfile.write(b"HTTP/1.1 429 No\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
                return
            self.rfile.read(length)
            if word == "close":
                return
            self.wfile.write(f"HTTP/1.1 {word} X\r\nContent-Length: 5\r\n\r\nhello".encode())


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_arrivals_are_seeded_ordered_and_as_many_as_asked() -> None:
    due = arrivals_s(200.0, 50.0, np.random.default_rng(0))
    assert due.tolist() == arrivals_s(200.0, 50.0, np.random.default_rng(0)).tolist()
    assert (np.diff(due) > 0).all()
    assert 0.0 < due[0] < due[-1] < 50.0
    assert len(due) == pytest.approx(10_000, abs=5 * 100)  # five standard deviations
    gaps = np.diff(due)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential


@pytest.mark.parametrize("body", [b"tiny", BODY])
def test_every_request_that_was_due_ends_in_one_way(server: Scripted, body: bytes) -> None:
    server.script = ["200", "200", "429", "503", "500", "200"]
    due = arrivals_s(400.0, 0.15, np.random.default_rng(1))
    offered = post_openly(server.server_address[1], post("/x", body, {}), due, deadline_s=PATIENCE_S)
    assert server.seen == offered.asked == len(due)
    assert offered.good == sum(server.script[at % 6] == "200" for at in range(len(due)))
    assert offered.refused == sum(server.script[at % 6] in ("429", "503") for at in range(len(due)))
    assert (offered.late, offered.failed) == (0, len(due) - offered.good - offered.refused)
    assert offered.good_p50_ms is not None and offered.refused_p99_ms is not None
    assert 0.0 < offered.good_p50_ms <= offered.good_p99_ms


def test_a_connection_that_closes_is_one_failure_or_refusal_and_another_is_opened(server: Scripted) -> None:
    server.script = ["200", "close", "early"]
    due = np.arange(1, 13) * 0.02
    offered = post_openly(server.server_address[1], post("/x", b"body", {}), due, deadline_s=PATIENCE_S)
    assert (offered.asked, offered.good, offered.refused, offered.failed) == (12, 4, 4, 4)


def test_what_comes_after_the_deadline_is_late(server: Scripted) -> None:
    server.script = ["200"]
    offered = post_openly(server.server_address[1], post("/x", b"body", {}), [0.0, 0.01], deadline_s=0.0)
    assert (offered.good, offered.late, offered.failed) == (0, 2, 0)
    assert offered.good_p50_ms is None


def test_calls_from_threads_are_counted_by_what_they_say() -> None:
    said = iter(["good"] * 5 + ["refused"] * 3 + ["failed"] * 2)
    lefts: list[float] = []
    lock = threading.Lock()

    def call(left_s: float) -> str:
        with lock:
            lefts.append(left_s)
            return next(said)

    offered = call_openly(call, np.linspace(0.0, 0.02, 10), threads=3, deadline_s=PATIENCE_S)
    assert (offered.asked, offered.good, offered.refused, offered.failed, offered.late) == (10, 5, 3, 2, 0)
    assert all(0.0 < left <= PATIENCE_S for left in lefts)
    late = call_openly(lambda left_s: "good", [0.0], threads=1, deadline_s=0.0)
    assert (late.good, late.late) == (0, 1)


def figures(**changes: Any) -> dict[str, Any]:
    board = {"edge_per_s": 50.0, "cloud_per_s": 200.0}
    rounds = {"alone": [(30, 100), (34, 100)], "together": [(100, 100), (990, 1000)]}
    rounds |= {key: value for key, value in changes.items() if key in rounds}
    board |= {who: [{"good": good, "asked": asked} for good, asked in pairs] for who, pairs in rounds.items()}
    slow = {"alone_per_s": 50.0, "goodput": 0.85, "refused": 1100, "refused_p99_ms": 12.0, "lives": True}
    slow |= changes.get("slow", {})
    http = {"goodput": 0.5, "lives": True, **changes.get("http", {})}
    return {"board": board, "slow_endpoint": slow, "http_bound_endpoint": http}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"together": [(100, 100), (989, 1000)]}, ["deadlines met at 3 times the board's rate, with the cloud"]),
        ({"alone": [(30, 100), (51, 100)]}, ["deadlines met at 3 times the board's rate, alone"]),
        ({"slow": {"alone_per_s": 301.0}}, ["requests a second that the slow endpoint answers"]),
        ({"slow": {"refused_p99_ms": 51.0}}, ["ms until a refusal by the slow endpoint, p99"]),
        ({"slow": {"refused": 0, "refused_p99_ms": None}}, ["refusals by the slow endpoint"]),
        ({"http": {"lives": False}}, ["endpoints that answer after the load, of 2"]),
    ],
)
def test_each_promise_is_judged_by_its_own_figure(changes: dict[str, Any], missed: list[str]) -> None:
    assert [line["promise"] for line in promises(figures(**changes)) if not line["met"]] == missed


def test_the_readme_shows_the_figures_and_what_was_missed() -> None:
    found = figures(alone=[(60, 100), (30, 100)])
    found["board"] |= {"deadline_ms": 250.0, "generator_share": 0.012}
    found["http_bound_endpoint"]["alone_per_s"] = 3000.0
    text = shown.overload({**found, "promises": promises(found)})
    assert "it meets 60.0% and 30.0% of its\ndeadlines of 250 ms alone, and 100.0% and 99.0% with the cloud" in text
    assert "goodput was 85% of that, and refusals took 12 ms at p99" in text
    assert text.endswith("\n\n- missed: deadlines met at 3 times the board's rate, alone: 0.6, 0.5 was asked")
    found = figures(slow={"refused": 0, "refused_p99_ms": None})
    found["board"] |= {"deadline_ms": 250.0, "generator_share": 0.012}
    found["http_bound_endpoint"]["alone_per_s"] = 3000.0
    text = shown.overload({**found, "promises": promises(found)})
    assert "nothing was refused" in text
    assert text.endswith("\n\n- missed: refusals by the slow endpoint: 0, 1 was asked")
