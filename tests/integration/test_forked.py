"""What a forked child does with a remote or a worker that its parent made: nothing is mixed up, and nothing hangs."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from outrider import Budget, Hybrid, Policy
from outrider.hybrid.strain import BoardWatch
from outrider_runtimes import _names
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.http import HttpClient, Origin
from outrider_runtimes.remote import Remote
from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import check_inputs
from outrider_runtimes.worker import Worker
from support import servers
from support.certificates import issue, serving
from support.forks import in_child
from support.grpc_servers import GrpcServer
from support.servers import INTERFACE, Server, http

pytestmark = pytest.mark.slow

X = np.float32([[1.0, 2.0], [3.0, 4.0]])
NEVER = Deadline(math.inf)


def ask(remote: Remote, factor: float = 1.0) -> bool:
    answer = remote.submit({"x": X * np.float32(factor)}, Deadline.after_ms(90_000.0)).result(100)
    return bool((answer.outputs["y"] == X * np.float32(factor) * 2).all())


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_child_has_connections_threads_and_ids_of_its_own(tmp_path, encrypted):
    own = issue(tmp_path) if encrypted else None
    with ExitStack() as stack:
        server = stack.enter_context(Server(tls=None if own is None else serving(own)))
        remote = stack.enter_context(Remote(server.url, model="m", tls=None if own is None else own.certificate))
        assert ask(remote) and server.connections == 1
        assert in_child(lambda: [ask(remote, 3.0), ask(remote, 4.0)]) == "[True, True]"
        assert server.connections == 2
        # The child has closed its end of the parent's connection, which still serves.
        assert ask(remote, 5.0) and server.connections == 2
        ids = [asked.decoded().id for asked in server.asked if asked.method == "POST"]
        assert len(ids) == len(set(ids)) == 4
        assert len({id.partition("-")[0] for id in ids}) == 2


def test_locks_that_were_held_and_threads_that_were_busy_hold_no_child():
    with Server() as server, Remote(server.url, model="m") as remote:
        assert ask(remote)
        client = remote._transport._client
        with client._lock, remote._pool._lock, remote._fetching, remote._estimating:
            assert in_child(lambda: ask(remote)) == "True"
        assert ask(remote)


def test_a_request_of_the_parents_ends_in_a_child_and_goes_on_in_the_parent():
    let_go = threading.Event()

    def waits(server, connection, asked):
        assert let_go.wait(200)
        servers.good(server, connection, asked)

    with Server() as server, Remote(server.url, model="m", threads=1) as remote:
        assert ask(remote)
        server.infer = waits
        sent, queued, given_up = [remote.submit({"x": X}, NEVER) for _ in range(3)]
        assert given_up.cancel()
        for future in (sent, queued):
            with future._condition:  # as a thread that is just ending it holds it
                said = in_child(lambda future=future: future.result(100))
            assert said.startswith("RunnerClosed") and "before a fork" in said
        let_go.set()
        for future in (sent, queued):
            np.testing.assert_array_equal(future.result(100).outputs["y"], X * 2)
        assert not remote._pool._futures


def test_a_remote_that_was_closed_is_closed_in_a_child():
    with Server() as server:
        remote = Remote(server.url, model="m")
        assert ask(remote)
        remote.close()
        assert in_child(lambda: ask(remote)).startswith("RunnerClosed")
        assert in_child(lambda: exchange(remote._transport._client)).startswith("RunnerClosed")


def exchange(client: HttpClient) -> str:
    return client.get("/", deadline=Deadline.after_ms(90_000), max_reply_bytes=99).body.decode()


def test_a_name_that_hangs_in_the_parent_is_not_waited_for_in_a_child(monkeypatch):
    let_go = threading.Event()
    with Server(metadata=lambda server, to, asked: to.sendall(http(b"hi"))) as server:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]

        def hangs(host, *args, **kwargs):
            if host == "hung.invalid":
                let_go.wait(200)
            return found

        monkeypatch.setattr(socket, "getaddrinfo", hangs)
        try:
            hung = [_names.lookup("hung.invalid", port) for port in range(1, _names.MAX_THREADS + 1)]
            client = HttpClient(Origin.from_url(f"http://other.invalid:{server.port}"))
            with _names._resolver._lock:
                assert in_child(lambda: exchange(client)) == "hi"
        finally:
            let_go.set()
        assert all(future.result(100) for future in hung)


class Doubles:
    """An executor."""

    interface = INTERFACE

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.begun = threading.Event()
        self.let = threading.Event()
        self.let.set()

    def check(self, inputs):
        return check_inputs(INTERFACE, inputs)

    def execute(self, arrays, *, check_ms=0.0):
        self.begun.set()
        assert self.let.wait(200)
        return Answer(outputs={"y": arrays[0] * 2}, timing_ms=Timing())

    def close(self):
        self.closed.set()


def test_a_worker_says_in_a_child_that_it_was_made_before_the_fork():
    session = Doubles()
    worker = Worker(session)
    assert worker.submit({"x": X}, NEVER).result(100)

    def child() -> list[object]:
        worker.close()
        return [session.closed.is_set(), worker.sick, worker.depth, worker.estimate_ms() is not None]

    def asks() -> object:
        return worker.submit({"x": X}, Deadline.after_ms(90_000)).result(100)

    session.let.clear()
    session.begun.clear()
    running = worker.submit({"x": X}, NEVER)
    assert session.begun.wait(120)
    with worker._lock:
        said = in_child(asks)
        assert said.startswith("RunnerClosed") and "before a fork" in said and "in the child" in said
        assert in_child(child) == "[False, False, 0, True]"
    session.let.set()
    assert running.result(100) and worker.submit({"x": X}, NEVER).result(100)
    worker.close()


class Edge(Doubles):
    """A runner in front of a worker, as a Model is."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker(self)
        self.submit, self.estimate_ms = self.worker.submit, self.worker.estimate_ms


def test_a_hybrid_ends_in_a_child_and_goes_on_in_the_parent(tmp_path):
    edge, told = Edge(), []
    policy = Policy(deadline_ms=90_000.0, budget=Budget(requests_per_day=50), hot_c=500.0)
    with Server() as server, Remote(server.url, model="m") as cloud:
        hybrid = Hybrid(edge, cloud, policy, state=tmp_path, root=tmp_path)
        hybrid.on_prediction(told.append)
        spending = hybrid._meter._spending
        assert (hybrid.infer(X).outputs["y"] == X * 2).all()
        held = (hybrid._cloud, hybrid._audits, hybrid._watchers, hybrid._board, spending)
        with ExitStack() as stack:
            for owner in held:
                stack.enter_context(owner._lock)
            said = in_child(lambda: hybrid.infer(X))
            assert said.startswith("RunnerClosed") and "before a fork" in said and "in the child" in said
            # What it would take off, write down or wake is its parent's.
            assert in_child(lambda: [hybrid.on_prediction(told.append)(), hybrid.close()]) == "[None, None]"
            assert "before a fork" in in_child(lambda: in_child(lambda: hybrid.infer(X)))
        assert hybrid.infer(X).source == "edge" and len(told) == 2
        hybrid.close()
        assert "was closed" in in_child(lambda: hybrid.infer(X))
    edge.worker.close()


def test_a_childs_look_at_the_board_is_its_own(tmp_path):
    watch = BoardWatch(tmp_path)

    def looks() -> bool:
        watch.latest(time.monotonic())
        thread = watch._thread
        watch.close()
        thread.join(100)
        return thread.is_alive()

    watch.latest(time.monotonic())
    with watch._lock:
        assert in_child(looks) == "False"
    assert watch._thread.is_alive()
    watch.close()
    # One that was closed stays closed.
    assert in_child(lambda: [watch.latest(time.monotonic()) and None, watch._thread]) == "[None, None]"


GRPC = """
import sys, json, numpy as np
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.remote import Remote
from support.forks import in_child
x = {"x": np.float32([[1, 2]])}
remote = Remote(sys.argv[1], model="m")
remote.infer(x, deadline_ms=90_000)
said = [in_child(lambda: remote.infer(x, deadline_ms=60_000)),
        in_child(lambda: remote.submit(x, Deadline.after_ms(60_000)).result(90)),
        in_child(remote.close)]
print(json.dumps([*said, remote.infer(x, deadline_ms=90_000).outputs["y"].tolist()]))
"""


def test_grpc_is_refused_in_a_child_and_goes_on_in_the_parent():
    with GrpcServer() as server:
        run = subprocess.run(
            [sys.executable, "-c", GRPC, server.url],
            cwd=Path(__file__).parent.parent,  # where ``support`` is
            capture_output=True,
            text=True,
            timeout=250,
            check=True,
        )
    asked, submitted, closed, after = json.loads(run.stdout)
    for said in (asked, submitted):
        assert said.startswith("RunnerClosed") and "before a fork" in said and "in the child" in said
    assert closed == "None" and after == [[2.0, 4.0]]
