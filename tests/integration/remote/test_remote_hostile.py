"""Every hostile reply against a client in its own process: a typed error, bounded memory, and the next call right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import grpc_servers, hostile_grpc, servers
from support.grpc_servers import GrpcServer
from support.hostile import BROKEN, LATE, REFUSED, WRONG
from support.hostile_client import MAX_REPLY_BYTES
from support.servers import Server

pytestmark = pytest.mark.slow

FOREVER_MS = 120_000
LATE_MS = 200
# Replies of up to 8 MB are read whole; what they inflate to, or announce, is up to a gigabyte.
MAX_GROWTH_BYTES = 2 * MAX_REPLY_BYTES
HOSTILE = {
    **{name: ("DeadlineExceeded", behave) for name, behave in LATE.items()},
    **{name: ("RemoteUnavailable", behave) for name, behave in BROKEN.items()},
    **{name: ("ReplyError", behave) for name, behave in WRONG.items()},
    **{name: ("RemoteRefused", behave) for name, behave in REFUSED.items()},
}


class Client:
    """The process; `ask` has it send one request and waits for what it tells."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.hostile_client", url],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, milliseconds: float) -> dict:
        self._process.stdin.write(f"{milliseconds}\n")
        self._process.stdin.flush()
        told = self._process.stdout.readline()
        assert told, "the client died"
        return json.loads(told)

    def stop(self) -> int:
        self._process.stdin.close()
        return self._process.wait(120)


@contextmanager
def client_of(url: str) -> Iterator[Client]:
    client = Client(url)
    assert client.ask(FOREVER_MS)["error"] is None
    yield client
    assert client.stop() == 0


@pytest.fixture(scope="module")
def http():
    with Server() as server, client_of(server.url) as client:
        yield server, client


@pytest.fixture(scope="module")
def grpc():
    with GrpcServer() as server, client_of(server.url) as client:
        yield server, client


def check(told: dict, after: dict, expected: str) -> None:
    assert (told["error"], told["outrider"]) == (expected, True), told
    assert told["text"] and "Traceback" not in told["text"] and len(told["text"]) < 600
    assert told["grown_bytes"] < MAX_GROWTH_BYTES
    assert after["error"] is None, after
    assert after["grown_bytes"] < MAX_GROWTH_BYTES


def test_there_are_more_than_were_promised():
    assert len(HOSTILE) >= 25


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_a_typed_error_in_bounded_memory(http, name):
    server, client = http
    expected, server.infer = HOSTILE[name]
    told = client.ask(LATE_MS if expected == "DeadlineExceeded" else FOREVER_MS)
    server.infer = servers.good
    check(told, client.ask(FOREVER_MS), expected)


@pytest.mark.parametrize("name", hostile_grpc.WRONG)
def test_so_it_is_over_grpc(grpc, name):
    server, client = grpc
    server.infer = hostile_grpc.WRONG[name]
    told = client.ask(FOREVER_MS)
    server.infer = grpc_servers.good
    check(told, client.ask(FOREVER_MS), "ReplyError")
