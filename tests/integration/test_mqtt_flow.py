"""What a broker allows a client to have under way, and what a client says when its connection comes and goes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outrider.telemetry import Reporter
from outrider.telemetry.mqtt import Message
from outrider.telemetry.record import topics
from support.broker import Mosquitto, wait_until
from support.listener import Listener
from support.relay import Relay
from support.scripted_broker import DISCONNECT, MQTT5, MQTT311, PUBLISH, Packet, ScriptedBroker
from support.telemetry import Source
from support.telemetry_trials import Impatient

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("allowed", [1, 3])
def test_no_more_is_under_way_than_the_broker_takes(tmp_path: Path, allowed: int) -> None:
    """MQTT 5, section 4.9: a broker hangs up on who sends more than its Receive Maximum. HiveMQ's is 10."""
    with ScriptedBroker() as broker, Reporter(broker.url, device="pi-07", state=tmp_path) as reporter:
        posted = [b"%d" % number for number in range(40)]
        assert all(reporter.post(Message(topic="t", payload=payload)) for payload in posted)
        broker.welcome(receive_maximum=allowed)
        came, confirmed = [], 0
        while confirmed < len(posted) + 2:  # status and info too
            packets = broker.read_up_to_here(topics("pi-07").receipt)
            assert all(packet.kind == PUBLISH and packet.flags & 0b0110 == 0b0010 for packet in packets)
            came += packets
            assert 0 < len(came) - confirmed <= allowed
            broker.confirm(came[confirmed].mid)
            confirmed += 1
        assert [packet.body[-len(payload) :] for packet, payload in zip(came[2:], posted, strict=True)] == posted


@pytest.mark.parametrize("half", [False, True], ids=["cut", "cut, and the broker hears nothing of it"])
def test_the_last_will_comes_before_the_birth_of_the_next_connection(tmp_path: Path, half: bool) -> None:
    status, said = topics("pi-07").status, lambda seen: json.loads(seen.payload)["reason"]
    with (
        Mosquitto(tmp_path / "mosquitto") as broker,
        Relay(broker.port) as relay,
        Listener(broker.port, status) as listener,
        Reporter(
            f"mqtt://127.0.0.1:{relay.port}", device="pi-07", state=tmp_path / "state", rng=Impatient(1)
        ) as reporter,
    ):
        for connections in range(1, 5):
            wait_until(lambda: len(listener.on(status)) == 2 * connections - 1, what=reporter.last_error)  # noqa: B023
            with Listener(broker.port, status) as late:
                wait_until(lambda: late.heard)
                assert (late.heard[0].retain, said(late.heard[0])) == (True, "connected")
            if connections < 4:
                (relay.cut_half if half else relay.cut)()
        assert [said(seen) for seen in listener.on(status)] == ["connected", "lost"] * 3 + ["connected"]


def test_a_broker_that_knows_mqtt_5_is_not_asked_for_less_because_it_hung_up_once(tmp_path: Path) -> None:
    """By 3.1.1 nobody would know any more what it refuses, nor how much it takes."""
    with (
        ScriptedBroker() as broker,
        Reporter(broker.url, device="pi-07", state=tmp_path, rng=Impatient(1)),
    ):
        broker.welcome(receive_maximum=20)
        broker.hang_up()
        levels = []
        for _ in range(5):
            levels.append(broker.greeted())
            broker.hang_up()
    assert levels == [MQTT5, MQTT5, MQTT5, MQTT311, MQTT5], "after three in a row another one may be in its place"


@contextmanager
def closing(reporter: Reporter) -> Iterator[None]:
    thread = threading.Thread(target=reporter.close)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_the_last_word_is_confirmed_before_the_connection_ends(tmp_path: Path) -> None:
    """A DISCONNECT that came first would leave the device online in the eyes of all, and without a last will."""
    with (
        ScriptedBroker() as broker,
        Reporter(broker.url, device="pi-07", state=tmp_path, clock=lambda: 100.0) as reporter,
    ):
        broker.welcome(receive_maximum=1)
        status = broker.read()
        assert b'"online"' in status.body
        with closing(reporter):
            wait_until(lambda: reporter.closed)
            broker.confirm(status.mid)
            while b'"closed"' not in (packet := broker.read()).body:  # info comes before
                broker.confirm(packet.mid)
            assert broker.read_up_to_here(topics("pi-07").receipt) == [], "no DISCONNECT yet"
            broker.confirm(packet.mid)
            assert broker.read().kind == DISCONNECT
            broker.send(0x30, bytes([0, 1]) + b"t" + bytes(1))  # something that nobody reads any more
            assert broker.read_or_end() is None, "an end and no reset"


def test_a_broker_that_does_not_confirm_the_last_word_gives_the_last_will(tmp_path: Path) -> None:
    with ScriptedBroker() as broker, Reporter(broker.url, device="pi-07", state=tmp_path) as reporter:
        broker.welcome(receive_maximum=20)
        packets: list[Packet] = [broker.read()]
        with closing(reporter):
            while (packet := broker.read_or_end()) is not None:
                packets.append(packet)
    assert b'"closed"' in packets[-1].body
    assert {packet.kind for packet in packets} == {PUBLISH}, "no DISCONNECT, which would take the last will back"


def test_who_closes_in_the_middle_of_everything_is_closed_and_not_lost(tmp_path: Path) -> None:
    status = topics("pi-07").status
    with Mosquitto(tmp_path / "mosquitto") as broker, Listener(broker.port, status) as listener:
        for number in range(1, 11):
            source = Source()
            with Reporter(
                broker.url,
                device="pi-07",
                state=tmp_path / "state",
                commit_interval_ms=1.0,
                metrics_interval_s=1e-5,
                home_assistant=True,
                rng=Impatient(1),
                clock=lambda: time.monotonic() / 100,  # the broker has minutes to confirm the last word
            ) as reporter:
                reporter.watch(source)
                wait_until(lambda: reporter.connected)
                source.predict(300)
                assert reporter.flush(200.0)
            wait_until(lambda: len(listener.on(status)) >= 2 * number, what="the farewell")  # noqa: B023
        reasons = [b'"connected"' in seen.payload or b'"closed"' in seen.payload for seen in listener.on(status)]
    assert reasons == [True] * 20
