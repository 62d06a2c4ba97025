"""A Sparkplug node at a real mosquitto, cut off and killed, judged by the specification's rules."""

from __future__ import annotations

import io
import itertools
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from outrider.telemetry import Reporter
from outrider.telemetry.sparkplug import SparkplugNode
from outrider.telemetry.vitals import Vitals
from outrider_runtimes.errors import ConfigError
from support import sparkplug, sparkplug_device
from support.broker import Mosquitto, wait_until
from support.listener import Listener
from support.relay import Relay
from support.telemetry import Source

pytestmark = pytest.mark.slow

BIRTH, DATA, DEATH, COMMAND = (f"spBv1.0/plant/{kind}/pi-07" for kind in ("NBIRTH", "NDATA", "NDEATH", "NCMD"))


class Prompt(random.Random):
    """Connections are tried again at once."""

    def uniform(self, a: float, b: float) -> float:
        return 0.02


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


class Thrice(Prompt):
    """And after the third time no more."""

    def __init__(self) -> None:
        super().__init__()
        self._waits = itertools.chain([0.02] * 3, itertools.repeat(3600.0))

    def uniform(self, a: float, b: float) -> float:
        return next(self._waits)


def a_node(port: int, state: Path, rng: random.Random | None = None) -> SparkplugNode:
    return SparkplugNode(f"mqtt://127.0.0.1:{port}", group="plant", device="pi-07", state=state, rng=rng or Prompt())


def bd_seqs(host: Listener, topic: str) -> list[int]:
    payloads = [sparkplug.decode(seen.payload) for seen in host.on(topic)]
    return [next(metric.long_value for metric in payload.metrics if metric.name == "bdSeq") for payload in payloads]


def test_the_rules_hold_over_cuts_rebirths_and_both_wraps(broker: Mosquitto, tmp_path: Path) -> None:
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "telemetry" / "pi-07.bdseq").write_text("254\n")
    with Relay(broker.port) as relay, Listener(broker.port, "spBv1.0/#") as host:
        with a_node(relay.port, tmp_path) as node:
            for session in range(4):
                wait_until(lambda: len(set(bd_seqs(host, BIRTH))) == session + 1, what=f"birth {session}")  # noqa: B023
                for number in range(1, 300 if session == 1 else 4):
                    told = len(host.on(DATA))
                    node.tell(Vitals(predictions=session * 1000 + number))
                    wait_until(lambda: len(host.on(DATA)) > told, what=f"data {number}")  # noqa: B023
                births = len(host.on(BIRTH))
                host.say(COMMAND, sparkplug.rebirth_command())
                wait_until(lambda: len(host.on(BIRTH)) > births, what="rebirth")  # noqa: B023
                if session < 3:
                    relay.cut()
        wait_until(lambda: len(host.on(DEATH)) == 4, what="the death of close()")
        assert sparkplug.violations(host.heard) == []
    assert bd_seqs(host, DEATH) == [254, 255, 0, 1]
    assert bd_seqs(host, BIRTH) == [254, 254, 255, 255, 0, 0, 1, 1]
    assert max(sparkplug.decode(seen.payload).seq for seen in host.on(DATA)) == 255


def test_each_connect_begins_clean_and_has_the_will_of_the_next_birth(tmp_path: Path) -> None:
    """A broker that takes the greeting and hangs up: what was in it, byte by byte, in both versions of MQTT."""
    with socket.create_server(("127.0.0.1", 0)) as listening, a_node(listening.getsockname()[1], tmp_path, Thrice()):
        greetings = [_greeting(listening) for _ in range(4)]
    assert [one.level for one in greetings] == [5, 4, 5, 4]
    for number, one in enumerate(greetings):
        assert one.flags == 0b0000_1110, "clean start, a will of QoS 1 that is not retained, no user"
        assert b"\x11" not in one.properties, "no session expiry: the session ends with the connection"
        assert one.topic == DEATH.encode()
        (metric,) = sparkplug.decode(one.payload).metrics
        assert (metric.name, metric.long_value) == ("bdSeq", number)
    assert (tmp_path / "telemetry" / "pi-07.bdseq").read_text() == "4\n"


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What of a CONNECT packet the rules are about."""

    level: int
    flags: int
    properties: bytes
    topic: bytes
    payload: bytes


def _greeting(listening: socket.socket) -> Greeting:
    """Take one CONNECT (MQTT 5, section 3.1) and hang up."""
    connection, _ = listening.accept()
    with connection, connection.makefile("rb") as stream:
        assert stream.read(1) == b"\x10"
        body = io.BytesIO(stream.read(_varint(stream)))
    assert _field(body) == b"MQTT"
    level, flags = body.read(2)
    body.read(2)  # keep alive
    properties = body.read(_varint(body)) if level == 5 else b""
    _field(body)  # the client's id
    if level == 5:
        body.read(_varint(body))  # the will's properties
    return Greeting(level=level, flags=flags, properties=properties, topic=_field(body), payload=_field(body))


def _field(stream: IO[bytes]) -> bytes:
    return stream.read(int.from_bytes(stream.read(2), "big"))


def _varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while True:
        (byte,) = stream.read(1)
        value, shift = value | (byte & 0x7F) << shift, shift + 7
        if not byte & 0x80:
            return value


def test_the_number_goes_on_after_kill_9(broker: Mosquitto, tmp_path: Path) -> None:
    command = [sys.executable, sparkplug_device.__file__, broker.url, str(tmp_path / "state")]
    with Listener(broker.port, "spBv1.0/#") as host:
        for lives in range(1, 4):
            child = subprocess.Popen(command)
            try:
                wait_until(lambda: len(host.on(BIRTH)) == lives, what=f"birth {lives}")  # noqa: B023
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait(120)
            wait_until(lambda: len(host.on(DEATH)) == lives, what=f"death {lives}")  # noqa: B023
        assert sparkplug.violations(host.heard) == []
    assert bd_seqs(host, BIRTH) == bd_seqs(host, DEATH) == [0, 1, 2]


def test_a_broker_that_was_away_costs_no_numbers(broker: Mosquitto, tmp_path: Path) -> None:
    broker.stop()
    with a_node(broker.port, tmp_path) as node:
        node.tell(Vitals(predictions=5))
        wait_until(lambda: node.last_error, what="an attempt failed")
        broker.start()
        wait_until(lambda: node.connected, what="connected")
    assert (tmp_path / "telemetry" / "pi-07.bdseq").read_text() == "1\n"
    with Listener(broker.port, "spBv1.0/#") as host, a_node(broker.port, tmp_path):
        wait_until(lambda: host.on(BIRTH), what="birth")
    assert bd_seqs(host, BIRTH) == [1]


def test_values_told_before_the_connection_are_in_the_birth(broker: Mosquitto, tmp_path: Path) -> None:
    broker.stop()
    with a_node(broker.port, tmp_path) as node:
        node.tell(Vitals(predictions=41, model="digits", problems=("throttled", "failures")))
        broker.start()
        with Listener(broker.port, "spBv1.0/#") as host:
            wait_until(lambda: node.connected, what="connected")
            host.say(COMMAND, sparkplug.rebirth_command())
            wait_until(lambda: host.on(BIRTH), what="birth")
    metrics = {metric.name: metric for metric in sparkplug.decode(host.on(BIRTH)[-1].payload).metrics}
    assert (metrics["Requests/Answered"].long_value, metrics["Model/Name"].string_value) == (41, "digits")
    assert metrics["Problems"].string_value == "throttled,failures"
    assert metrics["Latency/p95 ms"].is_null


def test_it_tells_what_a_reporter_reports(broker: Mosquitto, tmp_path: Path) -> None:
    source = Source()
    with (
        Listener(broker.port, "spBv1.0/#") as host,
        Reporter(
            broker.url, device="pi-07", state=tmp_path, commit_interval_ms=20.0, metrics_interval_s=0.2
        ) as reporter,
        a_node(broker.port, tmp_path) as node,
    ):
        reporter.on_vitals(node.tell)
        reporter.watch(source)
        wait_until(lambda: host.on(BIRTH), what="birth")
        source.predict(1, start=1)  # an interval may end among several

        def answered() -> set[int]:
            birth = sparkplug.decode(host.on(BIRTH)[0].payload)
            alias = next(metric.alias for metric in birth.metrics if metric.name == "Requests/Answered")
            told = [metric for seen in host.on(DATA) for metric in sparkplug.decode(seen.payload).metrics]
            return {metric.long_value for metric in told if metric.alias == alias}

        wait_until(lambda: 1 in answered(), what="what the reporter counted")
    assert sparkplug.violations(host.heard) == []


def test_a_kept_command_and_rubbish_are_no_request(broker: Mosquitto, tmp_path: Path) -> None:
    with Listener(broker.port, "spBv1.0/#") as host:
        host.say(COMMAND, sparkplug.rebirth_command(), retain=True)
        with a_node(broker.port, tmp_path) as node:
            wait_until(lambda: host.on(BIRTH), what="birth")
            host.say(COMMAND, b"\xff" * 40)
            host.say(COMMAND, sparkplug.rebirth_command(value=False))
            node.tell(Vitals(predictions=1))
            wait_until(lambda: host.on(DATA), what="data")
    assert len(host.on(BIRTH)) == 1


@pytest.mark.parametrize("content", [b"", b"-3", b"junk" * 100, b"99999"])
def test_a_damaged_number_is_no_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "telemetry").mkdir()
    path = tmp_path / "telemetry" / "pi-07.bdseq"
    path.write_bytes(content)
    a_node(1, tmp_path).close()
    assert 0 <= int(path.read_text()) <= 255


@pytest.mark.parametrize("group", ["", "a/b", "+", "#", "x\n", "x" * 65, 7])
def test_a_group_that_a_topic_cannot_hold(group: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group") as raised:
        SparkplugNode("mqtt://127.0.0.1:1", group=group, device="pi-07", state=tmp_path)
    assert "plant-3" in raised.value.hint
