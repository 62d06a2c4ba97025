"""What holds over HTTP and gRPC alike: `Remote.infer` in the caller's own thread, and what `close` wakes."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    DeadlineExceeded,
    InputError,
    InterfaceMismatch,
    ReplyError,
    RunnerClosed,
    UnknownTensor,
)
from outrider_runtimes.remote import Remote
from outrider_runtimes.tensors import Interface, TensorSpec
from support import grpc_servers, servers
from support.grpc_servers import GrpcServer
from support.hostile import LATE
from support.runners import until
from support.servers import Server

pytestmark = pytest.mark.slow

X = np.float32([[1.0, 2.0], [3.0, 4.0]])
DEADLINE_MS = 200.0
LATE_S = 120.0  # what a stalled machine may add
FOREVER_MS = 120_000.0


@pytest.fixture(params=["http", "grpc"])
def server(request):
    with Server() if request.param == "http" else GrpcServer() as server:
        yield server


def silent(server) -> object:
    return servers.silent if isinstance(server, Server) else grpc_servers.silent


def test_it_answers_as_submit_does_and_starts_no_thread(server):
    before = {thread.name for thread in threading.enumerate()}
    with Remote(server.url, model="m") as remote:
        for inputs in ({"x": X}, X, {"x": np.asfortranarray(X)}):
            np.testing.assert_array_equal(remote.infer(inputs, deadline_ms=FOREVER_MS).outputs["y"], X * 2)
        answer = remote.infer(X)
        assert 0 < answer.timing_ms.network < answer.timing_ms.total and remote.estimate_ms() > 0
        started = {thread.name for thread in threading.enumerate()} - before
        assert not [name for name in started if name.startswith("outrider-remote")]
        waited = remote.submit({"x": X}, Deadline.after_ms(FOREVER_MS)).result(200)
        np.testing.assert_array_equal(waited.outputs["y"], answer.outputs["y"])


def test_the_proxies_of_the_environment_are_not_asked(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
            for spelled in (name, name.upper()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with Remote(server.url, model="m") as remote:
            np.testing.assert_array_equal(remote.infer(X, deadline_ms=FOREVER_MS).outputs["y"], X * 2)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize("rows", [2_047, 2_048, 2_049, 1_000_000])
def test_bodies_of_every_size_arrive_whole(server, rows):
    """Around 16 KiB they are no longer copied; 8 MB go out in parts."""
    x = np.random.default_rng(rows).random((rows, 2), np.float32)
    with Remote(server.url, model="m") as remote:
        np.testing.assert_array_equal(remote.infer(x).outputs["y"], x * 2)


def test_wrong_inputs_are_refused_here(server):
    with Remote(server.url, model="m") as remote:
        for bad in ({"x": X.astype(np.float64)}, X[0], {"z": X}, {}):
            with pytest.raises(InputError):
                remote.infer(bad, deadline_ms=FOREVER_MS)
        assert not [asked for asked in server.asked if getattr(asked, "method", "POST") == "POST"]


def test_an_array_alone_needs_an_interface_of_one_input():
    two = Interface(
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=(None, 2), axes="NC") for name in "ab"),
        outputs=servers.INTERFACE.outputs,
    )
    ours = {"interface": two.to_dict(), "interface_digest": two.digest}
    with Server(ours=ours) as server, Remote(server.url, model="m") as remote, pytest.raises(UnknownTensor):
        remote.infer(X, deadline_ms=FOREVER_MS)


@pytest.mark.parametrize("fault", LATE)
def test_what_is_too_slow_ends_by_the_deadline(fault):
    with Server() as server, Remote(server.url, model="m") as remote:
        remote.infer(X)
        server.infer = LATE[fault]
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            remote.infer(X, deadline_ms=DEADLINE_MS)
        assert time.monotonic() - begun_s < DEADLINE_MS / 1000 + LATE_S
        server.infer = servers.good
        np.testing.assert_array_equal(remote.infer(X).outputs["y"], X * 2)


@pytest.mark.parametrize("milliseconds", [FOREVER_MS, None])
def test_close_wakes_a_caller(server, milliseconds):
    remote = Remote(server.url, model="m")
    remote.infer(X)
    server.infer = silent(server)
    sent = len(server.asked)
    ended: list[BaseException] = []

    def call() -> None:
        try:
            remote.infer(X, deadline_ms=milliseconds)
        except BaseException as error:
            ended.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    until(lambda: len(server.asked) > sent)
    remote.close()
    caller.join(200)
    assert [type(error) for error in ended] == [RunnerClosed]
    with pytest.raises(RunnerClosed):
        remote.infer(X)


@pytest.mark.parametrize("milliseconds", [FOREVER_MS, None])
def test_close_wakes_what_was_submitted(server, milliseconds):
    remote = Remote(server.url, model="m", threads=2, queue_size=4)
    remote.infer(X)
    server.infer = silent(server)
    sent = len(server.asked)
    futures = [remote.submit({"x": X}, Deadline.after_ms(milliseconds)) for _ in range(4)]
    until(lambda: len(server.asked) == sent + 2)
    remote.close()
    for future in futures:
        with pytest.raises(RunnerClosed):
            future.result(200)
    with pytest.raises(RunnerClosed):
        remote.submit({"x": X}, Deadline.after_ms(FOREVER_MS))
    remote.close()


def test_another_interface_is_a_mismatch(server):
    with Remote(server.url, model="m") as remote:
        remote.infer(X)
        other = servers.INTERFACE.to_dict() | {"labels": ["a", "b"]}
        digest = Interface.from_dict(other).digest
        server.ours = {"bundle": "d" * 64, "interface": other, "interface_digest": digest}
        with pytest.raises(ReplyError, match="another bundle"):
            remote.infer(X)
        with pytest.raises(InterfaceMismatch):
            remote.infer(X)
        assert remote.interface_digest == digest
        np.testing.assert_array_equal(remote.infer(X).outputs["y"], X * 2)
