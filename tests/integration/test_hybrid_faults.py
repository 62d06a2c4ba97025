"""Hybrid over a real Worker and a real Remote while the network, the server, the names or the worker do their worst.

What is proved: each call ends with an answer or a typed error, whatever comes, and 200 of them leave a bounded number
of threads. How late they are is the benchmark's to say (``benchmarks/overshoot.py``): here no time decides.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider.prediction import Prediction
from outrider_runtimes._names import MAX_THREADS
from outrider_runtimes.errors import DeadlineExceeded, QueueFull, RunnerClosed
from outrider_runtimes.remote import Remote
from outrider_runtimes.worker import Worker
from support import servers
from support.doubler import Doubler
from support.servers import Server, http

pytestmark = pytest.mark.slow

X = np.float32([[1.0, 2.0]])
NOWHERE = Path("/nowhere")
DEADLINE_MS = 25.0
CALLERS = 4
LATE_S = 120.0  # a call that waits for ever is what this would catch
# The circuit stays closed and no round trip is believed, so that every call meets the fault.
ALWAYS = Policy(
    DEADLINE_MS, min_margin=1.0, failures_in_a_row=10**6, window=1024, open_s=1e-6, open_max_s=1e-6, hot_c=None,
    offload_when_throttled=False, offload_when_low_power=False,
)  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\n"
FAULTS = {
    "drips its headers": servers.drips(HEAD + b"X: " + b"x" * 10_000),
    "drips its body": servers.drips(http(b" " * 10_000)),
    "says nothing": servers.silent,
    "resets": servers.resets,
    "503": servers.says(http(b"", status="503 Service Unavailable")),
    "100 Continue for ever": servers.endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "drips 100 Continue": servers.drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "a gigabyte": servers.endless(HEAD + b"Content-Length: 1000000000\r\n\r\n" + b"x" * 100_000),
}
CLOUD_REASONS = {"cloud_late", "cloud_unavailable", "cloud_refused", "cloud_bad_reply", "cloud_busy", "no_time_left"}


@pytest.fixture
def doubler():
    doubler = Doubler()
    yield doubler
    doubler.let_go()


@pytest.fixture
def edge(doubler):
    worker = Worker(doubler)
    yield worker
    doubler.let_go()
    worker.close()


@pytest.fixture
def server():
    with Server() as server:
        yield server


BEFORE: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _threads_of_other_tests() -> None:
    BEFORE.clear()
    BEFORE.update(threading.enumerate())


def ours() -> Counter[str]:
    """This test's threads by what they do. Those that look names up are all remotes', of this test or another."""
    names = [
        thread.name.rstrip("0123456789").rstrip("-")
        for thread in threading.enumerate()
        if thread not in BEFORE or thread.name.startswith("outrider-dns")
    ]
    return Counter(name for name in names if name.startswith("outrider") and name != "outrider-strain")


def outcomes(hybrid: Hybrid, calls: int, callers: int = CALLERS) -> Counter[tuple[str, str]]:
    """What so many calls end with: a source and a reason, or an error's name. Each must end."""

    def call(_: int) -> tuple[str, str]:
        try:
            prediction = hybrid.infer({"x": X})
        except (DeadlineExceeded, QueueFull) as error:
            return "raised", type(error).__name__
        np.testing.assert_array_equal(prediction.outputs["y"], X * 2)
        return prediction.source, prediction.reason

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(call, number) for number in range(calls)]
        return Counter(future.result(LATE_S) for future in futures)


def test_two_hundred_faulted_calls_each_end_and_leave_a_bounded_number_of_threads(edge, server):
    with Remote(server.url, model="m", threads=4) as remote:
        hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
        hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        seen: Counter[tuple[str, str]] = Counter()
        for fault in FAULTS.values():
            server.infer, before = fault, len(server.asked)
            seen += outcomes(hybrid, 25)
            while len(server.asked) == before:  # the fault was not met: on a busy machine no call may have the time
                seen += outcomes(hybrid, 25)
            server.drop()
            assert ours()["outrider-remote"] <= 4 and ours()["outrider-worker"] == 1
        assert seen.total() >= 25 * len(FAULTS) == 200
        assert {source for source, _ in seen} <= {"edge_degraded", "raised"}
        assert {reason for source, reason in seen if source == "edge_degraded"} <= CLOUD_REASONS
        assert set(ours()) <= {"outrider-remote", "outrider-worker", "outrider-worker-watch", "outrider-dns"}
        assert all(count <= 4 for count in ours().values())
        server.infer = servers.good
        prediction = hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        assert (prediction.source, prediction.reason) == ("cloud", "uncertain")


@pytest.mark.parametrize("behave", [servers.good, servers.silent], ids=["good", "silent"])
def test_two_hundred_callers_at_once_each_end_and_are_served_by_few_threads(edge, server, behave):
    """What is counted is what is alive while they call, not only what is left of it."""
    peak: Counter[str] = Counter()
    with Remote(server.url, model="m", threads=4) as remote, ThreadPoolExecutor(1) as pool:
        hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
        hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        server.infer = behave
        calling = pool.submit(outcomes, hybrid, 600, callers=200)
        while not calling.done():
            peak |= ours()
        peak |= ours()
        assert calling.result().total() == 600
    assert 1 <= peak["outrider-remote"] <= 4 and peak["outrider-worker"] == 1, peak
    assert set(peak) <= {"outrider-remote", "outrider-worker", "outrider-worker-watch", "outrider-dns"}, peak
    assert peak["outrider-worker-watch"] <= 1 and peak["outrider-dns"] <= MAX_THREADS, peak


def test_callers_that_wait_when_both_are_closed_have_the_edges_answer(edge, server):
    """Nobody has a deadline. The hybrid lets them go on; the remote wakes them."""
    with ThreadPoolExecutor(4) as pool:
        remote = Remote(server.url, model="m", threads=4)
        hybrid = Hybrid(edge, remote, Policy(None, min_margin=1.0, failures_in_a_row=10**6, window=1024), root=NOWHERE)
        server.infer = servers.silent
        calls = [pool.submit(hybrid.infer, {"x": X}) for _ in range(4)]
        end_s = time.monotonic() + LATE_S
        while sum(asked.method == "POST" for asked in server.asked) < 4:
            assert time.monotonic() < end_s
            time.sleep(0.001)
        hybrid.close()
        remote.close()
        told = {(call.result(LATE_S).source, call.result().reason) for call in calls}
        assert told == {("edge_degraded", "cloud_unavailable")}
        with pytest.raises(RunnerClosed):
            hybrid.infer({"x": X})


@pytest.mark.parametrize("fault", ["says nothing", "100 Continue for ever", "503"])
def test_a_stuck_worker_and_a_bad_cloud_at_once_end_every_call(edge, doubler, server, fault):
    with Remote(server.url, model="m", threads=2) as remote:
        hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
        hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        server.infer = FAULTS[fault]
        doubler.stick()
        seen = outcomes(hybrid, 60)
        assert seen.total() == 60
        assert {source for source, _ in seen} == {"raised"}
        assert ours()["outrider-worker"] == 1 and ours()["outrider-worker-watch"] <= 1
        assert ours()["outrider-remote"] <= 2


def stuck_in(doubler: Doubler, pool: ThreadPoolExecutor, hybrid: Hybrid) -> Future[Prediction]:
    """A call of the edge's that does not come back. One whose time was over before it began is made again."""
    doubler.stick()
    call = pool.submit(hybrid.infer, {"x": X})
    end_s = time.monotonic() + LATE_S
    while not doubler.held:
        assert time.monotonic() < end_s
        if call.done():
            call = pool.submit(hybrid.infer, {"x": X})
        time.sleep(0.001)
    return call


def test_behind_a_stuck_worker_a_good_cloud_answers_once_it_is_seen(edge, doubler, server):
    with Remote(server.url, model="m") as remote, ThreadPoolExecutor(1) as pool:
        hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
        hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        with pytest.raises(DeadlineExceeded):
            stuck_in(doubler, pool, hybrid).result(LATE_S)
        end_s = time.monotonic() + LATE_S
        while not edge.sick:
            assert time.monotonic() < end_s
            time.sleep(0.001)
        prediction = hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        assert (prediction.source, prediction.reason) == ("cloud", "edge_failed")


def test_a_caller_without_a_deadline_is_told_when_the_call_before_it_is_stuck(edge, doubler, server):
    """Nobody submits again: it is the end of the first caller's patience that has the worker looked at."""
    with Remote(server.url, model="m") as remote, ThreadPoolExecutor(1) as pool:
        hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
        hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)
        first = stuck_in(doubler, pool, hybrid)
        prediction = hybrid.infer({"x": X}, deadline_ms=LATE_S * 1e3)  # waits behind it, for far longer
        assert (prediction.source, prediction.reason) == ("cloud", "edge_failed")
        with pytest.raises(DeadlineExceeded):
            first.result(LATE_S)


def test_a_name_that_is_never_resolved_holds_nobody(edge, monkeypatch):
    let_go = threading.Event()
    real = socket.getaddrinfo

    def hangs(host, *args, **kwargs):
        if host != "hung.invalid":
            return real(host, *args, **kwargs)
        let_go.wait(LATE_S)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    try:
        with Remote("http://hung.invalid:8000", model="m") as remote:
            hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
            seen = outcomes(hybrid, 60)
        assert seen.total() == 60
        assert {source for source, _ in seen} <= {"edge_degraded", "raised"}
        assert 1 <= ours()["outrider-dns"] <= MAX_THREADS
    finally:
        let_go.set()


def test_a_server_that_drips_its_handshake_holds_nobody(edge):
    def hello(server: Server, connection: socket.socket) -> None:
        record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 16_000
        for at in range(len(record)):
            connection.sendall(record[at : at + 1])
            if server.stopping.wait(0.005):
                return

    with Server(hello=hello) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with Remote(url, model="m") as remote:
            hybrid = Hybrid(edge, remote, ALWAYS, root=NOWHERE)
            seen = outcomes(hybrid, 60)
    assert seen.total() == 60
    assert {source for source, _ in seen} <= {"edge_degraded", "raised"}
    assert set(ours()) <= {"outrider-remote", "outrider-worker", "outrider-worker-watch", "outrider-dns"}


@pytest.mark.parametrize("jump_s", [-86_400.0 * 400, -3600.0, 3600.0, 86_400.0 * 400])
def test_a_wall_clock_that_jumps_changes_no_deadline(edge, server, tmp_path, jump_s):
    """Deadlines, the breaker and the round trip are on the monotonic clock; the wall clock opens no new hour twice."""
    from outrider.policy import Budget

    wall = Wall()
    policy = Policy(LATE_S * 1e3, min_margin=1.0, budget=Budget(requests_per_hour=2))
    with Remote(server.url, model="m") as remote:
        hybrid = Hybrid(edge, remote, policy, state=tmp_path, wall=wall, root=NOWHERE)
        told = [hybrid.infer({"x": X}).reason for _ in range(3)]
        assert told == ["uncertain", "uncertain", "budget_spent"]
        wall.now_s += jump_s
        told = [hybrid.infer({"x": X}).reason for _ in range(3)]
        assert told == (["uncertain", "uncertain", "budget_spent"] if jump_s > 0 else ["budget_spent"] * 3)
        wall.now_s -= jump_s  # it is set right: what was spent in the hour that came is spent
        # A day that was more than one ahead is taken back, with what was spent; the right one is then a new one.
        assert hybrid.infer({"x": X}).reason == ("uncertain" if jump_s < -2 * 86_400.0 else "budget_spent")
        hybrid.close()


class Wall:
    def __init__(self) -> None:
        self.now_s = 1.7e9

    def __call__(self) -> float:
        return self.now_s
