"""A model that is stuck in the endpoint's own loop: the other models go on, over new connections."""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.broker import wait_until
from support.endpoint_child import Child, write_models

FOR_EVER = 10**15  # trips; a thousand million take a quarter of an hour
# Seconds of them, on whatever machine: as many as one look after the other has not seen the end of.
SOME = 4_000_000
STUCK_LOOKS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def body_of(name: str, data: list[Any], shape: list[int], datatype: str, **parameters: Any) -> bytes:
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


LINEAR = body_of("x", [1.0] * 4, [1, 4], "FP32")


def trips(number: int, **parameters: Any) -> bytes:
    return body_of("trips", [number], [], "INT64", **parameters)


class Connection:
    """A kept one."""

    def __init__(self, child: Child) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", child.port, timeout=120)
        self._http.connect()

    def send(self, model: str, body: bytes) -> None:
        self._http.request("POST", f"/v2/models/{model}/infer", body)

    def status(self) -> int:
        reply = self._http.getresponse()
        reply.read()
        return reply.status

    def ask(self, model: str, body: bytes) -> int:
        self.send(model, body)
        return self.status()

    def get(self, path: str) -> tuple[int, Any]:
        self._http.request("GET", path)
        reply = self._http.getresponse()
        return reply.status, json.loads(reply.read())


def taken_over(child: Child, stuck: Connection, idle: Connection) -> Connection:
    """Both are cut; a new connection is answered."""
    for each in (stuck, idle):
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            each.status()
    connection = Connection(child)
    assert connection.ask("linear", LINEAR) == 200
    return connection


def test_another_loop_takes_over_and_what_was_inside_is_counted(models: Path) -> None:
    child = Child(models, slow_in_loop=True, stuck_looks=STUCK_LOOKS, drain_s=1.0)
    stuck, idle = Connection(child), Connection(child)
    assert (idle.ask("linear", LINEAR), stuck.ask("slow", trips(5))) == (200, 200)
    stuck.send("slow", trips(FOR_EVER))
    idle.send("linear", LINEAR)  # which nobody reads: the loop is stuck
    after = taken_over(child, stuck, idle)
    assert after.get("/v2/health/live") == (200, {"live": True})
    # It is known to be stuck once its caller's time has passed, a minute; until then what comes waits for its own.
    assert after.ask("slow", trips(5, timeout=200_000)) in (503, 504)
    assert after.ask("linear", LINEAR) == 200
    said = child.stop()
    assert "slow is stuck in the endpoint's loop" in said and "Traceback" not in said
    reasons = {(m["model"], r["reason"]): r["requests"] for m in child.quality["models"] for r in m["reasons"]}
    assert reasons["slow", "stuck"] >= 1 and reasons["linear", "ok"] == 3 and reasons["slow", "ok"] == 1


def processor_s(child: Child) -> float:
    """What it has used of it."""
    ticks = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()[11]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def test_a_signal_that_came_while_the_loop_was_stuck_ends_the_endpoint(models: Path) -> None:
    child = Child(models, slow_in_loop=True, stuck_looks=STUCK_LOOKS, drain_s=1.0)
    stuck = Connection(child)
    assert stuck.ask("slow", trips(5)) == 200
    before_s = processor_s(child)
    stuck.send("slow", trips(FOR_EVER))
    wait_until(lambda: processor_s(child) > before_s + 0.3)  # it counts
    assert "slow is stuck in the endpoint's loop" in child.stop()


def test_a_call_that_comes_back_ends_the_old_loop_and_its_model_answers_again(models: Path) -> None:
    child = Child(models, slow_in_loop=True, stuck_looks=3)
    number = SOME
    while True:
        stuck = Connection(child)
        stuck.send("slow", trips(number))
        try:
            assert stuck.status() == 200  # it came back before anybody had looked often enough
        except (http.client.RemoteDisconnected, ConnectionError):
            break
        number *= 2
    after = Connection(child)
    wait_until(lambda: after.ask("slow", trips(5)) == 200)
    assert after.ask("linear", LINEAR) == 200
    assert after.get("/v2/health/ready") == (200, {"ready": True})
    assert "Traceback" not in child.stop()
