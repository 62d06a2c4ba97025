"""What is sent again to a real server, and what is not. No pause decides a test: the server changes during it."""

from __future__ import annotations

import random
import socket
import time

import numpy as np
import pytest

from outrider.hybrid.cloud import Cloud, Miss
from outrider.policy import Policy
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import RemoteRefused, RemoteUnavailable, RunnerClosed
from outrider_runtimes.remote import Remote
from outrider_runtimes.runner import Answer
from support import servers
from support.servers import Server, http

pytestmark = pytest.mark.slow

X = np.float32([[1.0, 2.0]])
BUSY = http(b'{"error": "busy"}', status="503 Service Unavailable", headers="Retry-After: 0\r\n")


class Dice(random.Random):
    """Calls `then` with the number of the throw; every throw is 0."""

    def __init__(self, then=lambda throw: None) -> None:
        super().__init__(0)
        self.throws = 0
        self.then = then

    def random(self) -> float:
        self.throws += 1
        self.then(self.throws)
        return 0.0


def ask(remote: Remote, milliseconds: float | None = 120_000.0) -> np.ndarray:
    return remote.submit({"x": X}, Deadline.after_ms(milliseconds)).result(200).outputs["y"]


def infers(server: Server) -> int:
    return sum(asked.method == "POST" for asked in server.asked)


@pytest.fixture
def taken():
    """A port at which nobody listens, and nobody else may."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held


def test_a_server_that_comes_up_meanwhile_is_asked_again(taken):
    started: list[Server] = []
    port = taken.getsockname()[1]

    def comes_up(throw: int) -> None:
        if throw == 2:
            taken.close()
            started.append(Server(port=port))

    dice = Dice(comes_up)
    with Remote(f"http://127.0.0.1:{port}", model="m", rng=dice) as remote:
        np.testing.assert_array_equal(ask(remote), X * 2)
    assert dice.throws == 2 and infers(started[0]) == 1
    started[0].__exit__()


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_nobody_is_asked_more_often_than_was_said(taken, retries):
    dice = Dice()
    with Remote(f"http://127.0.0.1:{taken.getsockname()[1]}", model="m", retries=retries, rng=dice) as remote:
        with pytest.raises(RemoteUnavailable, match="refused"):
            ask(remote)
        assert dice.throws == retries


def test_a_busy_endpoint_is_asked_again_when_it_says():
    answers = iter([False, False, True])

    def infer(server, connection, asked):
        servers.good(server, connection, asked) if next(answers) else connection.sendall(BUSY)

    with Server(infer=infer) as server, Remote(server.url, model="m") as remote:
        np.testing.assert_array_equal(ask(remote), X * 2)
        assert infers(server) == 3 and server.connections == 1


def test_an_endpoint_that_stays_busy_is_asked_three_times():
    with Server(infer=servers.says(BUSY)) as server, Remote(server.url, model="m") as remote:
        with pytest.raises(RemoteRefused, match="busy") as caught:
            ask(remote)
        assert (infers(server), caught.value.retry_after_s) == (3, 0.0)


@pytest.mark.parametrize("said", ["", "Retry-After: 5\r\n", "Retry-After: -1\r\n", "Retry-After: Sun, 22 Nov 2026\r\n"])
def test_without_a_time_that_fits_the_caller_is_told_at_once(said):
    bad = http(b"", status="503 Service Unavailable", headers=said)
    with Server(infer=servers.says(bad)) as server, Remote(server.url, model="m") as remote:
        remote.connect(Deadline.after_ms(120_000))
        with pytest.raises(RemoteRefused):
            ask(remote, 8000.0)
        assert infers(server) == 1


@pytest.mark.parametrize("fault", [servers.resets, servers.says_and_closes(b"HTTP/1.1 200 OK\r\n")])
def test_what_broke_after_it_was_sent_is_not_sent_again(fault):
    with Server(infer=fault) as server, Remote(server.url, model="m") as remote:
        remote.connect(Deadline.after_ms(120_000))
        server.drop()  # the request has a connection of its own
        with pytest.raises(RemoteUnavailable) as caught:
            ask(remote)
        assert infers(server) == 1 and not caught.value.unsent


def test_close_ends_a_pause():
    """The endpoint says 4 s; nobody waits for it."""
    bad = http(b"", status="503 Service Unavailable", headers="Retry-After: 4\r\n")
    with Server(infer=servers.says(bad)) as server:
        remote = Remote(server.url, model="m", rng=Dice(lambda throw: remote._pool.closing.set()))
        with pytest.raises(RunnerClosed):
            ask(remote)
        remote.close()


def test_who_has_another_answer_is_told_at_once_that_nobody_listens():
    dice = Dice()
    with Server() as server, Remote(server.url, model="m", rng=dice) as remote:
        interface = remote.connect(Deadline.after_ms(120_000))
        policy = Policy(deadline_ms=1000.0)
        cloud = Cloud(remote, interface, policy, clock=time.monotonic, rng=random.Random(1), meter=None)
        cloud.introduce(Deadline.after_ms(120_000))
        answer = cloud.ask({"x": X}, Deadline.after_ms(120_000), patient=False)
        assert isinstance(answer, Answer)
        np.testing.assert_array_equal(answer.outputs["y"], X * 2)
        server.__exit__()
        for failures, (patient, throws) in enumerate(((False, 1), (True, 3)), 1):
            missed = cloud.ask({"x": X}, Deadline.after_ms(120_000), patient=patient)
            assert isinstance(missed, Miss) and missed.reason == "cloud_unavailable"
            assert dice.throws == throws
            assert cloud.breaker.streak == failures  # however often it was tried


def test_the_breaker_sees_one_failure_a_request():
    """However often it was sent; and none where a sound endpoint is busy."""
    dice = Dice()
    with Server(infer=servers.says(BUSY)) as server, Remote(server.url, model="m", rng=dice) as remote:
        interface = remote.connect(Deadline.after_ms(120_000))
        cloud = Cloud(
            remote, interface, Policy(deadline_ms=1000.0), clock=time.monotonic, rng=random.Random(1), meter=None
        )
        missed = cloud.ask({"x": X}, Deadline.after_ms(120_000))
        assert isinstance(missed, Miss) and missed.reason == "cloud_busy"
        assert infers(server) == 3 and dice.throws == 2 and cloud.breaker.streak == 0
        server.__exit__()
        for request in (1, 2):
            missed = cloud.ask({"x": X}, Deadline.after_ms(120_000))
            assert isinstance(missed, Miss) and missed.reason == "cloud_unavailable"
            assert dice.throws == 2 + 2 * request
            assert cloud.breaker.streak == request
