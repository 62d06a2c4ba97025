"""Device, broker and consumer together, over a real mosquitto that is killed and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from outrider.telemetry import Limits, Record, Reporter, Sink, Spool
from outrider.telemetry.attachment import Attachment
from outrider.telemetry.record import Range, Receipt, decode_batch, decode_status, encode_receipt, topics
from outrider_runtimes.errors import ConfigError
from support.broker import Mosquitto, wait_until
from support.ports import free_port
from support.telemetry import Source, a_stream
from support.telemetry_trials import Impatient

TESTS = Path(__file__).parents[1]
QUICK = Limits(receipt_timeout_s=0.3, batch_records=50)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


@pytest.fixture
def source() -> Source:
    return Source()


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that is killed at the end, whatever the test did."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def open_reporter(url: str, tmp_path: Path, **changes: Any) -> Reporter:
    options: dict[str, Any] = {
        "device": "pi-07",
        "state": tmp_path / "state",
        "commit_interval_ms": 20.0,
        "limits": QUICK,
        "metrics_interval_s": None,
        "rng": Impatient(1),
    }
    return Reporter(url, **(options | changes))


class Listener:
    """A plain subscriber, and someone who publishes whatever is asked for."""

    def __init__(self, url: str, topic: str) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self._ready = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self.client.on_message = lambda _c, _d, m: self.messages.append((m.topic, m.payload, m.retain))
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.connect("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.client.subscribe(topic, qos=1)
        self.client.loop_start()
        assert self._ready.wait(120)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def publish(self, topic: str, payload: bytes) -> None:
        self.client.publish(topic, payload, qos=1).wait_for_publish(120)


def test_everything_offered_arrives_once_and_is_accounted_for(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    records: list[tuple[str, Record]] = []
    with Sink(broker.url, on_record=lambda device, record: records.append((device, record))) as sink:
        wait_until(lambda: sink.connected)
        with open_reporter(broker.url, tmp_path) as reporter:
            reporter.watch(source)
            source.predict(500)
            assert reporter.event("calibrated", sensor="imu", drift=0.25)
            assert reporter.flush(200.0, level="sink")
            account, count = reporter.account(), sink.count()
            assert (account.offered, account.lost) == (501, 0)
            assert (account.enqueued, account.delivered, account.pending, account.dropped) == (501, 501, 0, 0)
            assert (count.received, count.gaps, count.missing, count.malformed) == (501, 0, 0, 0)
            assert count.streams[0].stream == reporter.spool.stream
    assert {device for device, _ in records} == {"pi-07"}
    assert [record.seq for _, record in records] == list(range(1, 502))
    first, last = records[0][1], records[-1][1]
    assert (first.kind, last.kind) == ("prediction", "event")
    assert first.body == {
        "source": "edge",
        "reason": "local",
        "variant": "onnx-int8",
        "engine": "onnxruntime",
        "bundle": "ab" * 32,
        "verified": True,
        "timing_ms": {"queue": 0.0, "pre": 0.0, "infer": 1.25, "post": 0.0, "network": 0.0, "total": 0.0},
    }
    assert last.body == {"name": "calibrated", "fields": {"sensor": "imu", "drift": 0.25}}
    assert first.boot_id == last.boot_id
    assert 0.0 <= last.wall_s - first.wall_s < 200.0


def test_the_levels_of_delivery(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    with open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(10)
        assert reporter.flush(200.0)
        assert reporter.flush(200.0, level="broker")
        assert not reporter.flush(0.2, level="sink"), "there is no consumer"
        assert reporter.account().pending == 10
        with pytest.raises(ConfigError, match="level"):
            reporter.flush(level="moon")  # type: ignore[arg-type]


def test_without_a_consumer_records_wait_and_go_when_it_comes(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    limits = Limits(receipt_timeout_s=0.2, batch_records=10, window_batches=2)
    with open_reporter(broker.url, tmp_path, limits=limits) as reporter:
        reporter.watch(source)
        source.predict(100)
        assert not reporter.flush(0.5, level="sink")
        assert reporter.account().pending == 100
        with Sink(broker.url) as sink:
            assert reporter.flush(200.0, level="sink")
            assert sink.count().received == 100
            assert (sink.count().gaps, sink.count().missing) == (0, 0)


def test_without_a_broker_records_wait_on_the_disk(tmp_path: Path, source: Source) -> None:
    broker = Mosquitto(tmp_path / "mosquitto")
    with open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(50)
        assert reporter.flush(200.0)
        wait_until(lambda: "refused" in reporter.last_error)
        assert not reporter.connected
        assert not reporter.flush(0.1, level="broker")
        with broker, Sink(broker.url) as sink:
            assert reporter.flush(200.0, level="sink")
            assert reporter.connected
            assert reporter.last_error == ""
            assert sink.count().received == reporter.account().delivered == 50


def test_a_broker_that_is_killed_again_and_again_loses_nothing(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    seen: list[int] = []
    with (
        Sink(broker.url, on_record=lambda _, record: seen.append(record.seq)) as sink,
        open_reporter(broker.url, tmp_path) as reporter,
    ):
        reporter.watch(source)
        for round_ in range(3):
            source.predict(1000)
            wait_until(lambda round_=round_: sink.count().received > round_ * 1000)
            broker.restart()
            source.predict(1000)
            assert reporter.flush(200.0, level="sink")
            account = reporter.account()
            assert account.enqueued == account.delivered == (round_ + 1) * 2000
        assert (account.pending, account.dropped, account.lost) == (0, 0, 0)
        count = sink.count()
        assert (count.received, count.gaps, count.missing) == (6000, 0, 0)
    assert seen == list(range(1, 6001)), "in order, once each"


def test_a_broker_that_stops_reading_stops_nobody(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    with Sink(broker.url) as sink, open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(10)
        assert reporter.flush(200.0, level="sink")
        broker.send(signal.SIGSTOP)
        source.predict(2000)
        assert reporter.flush(200.0), "the disk does not wait for the network"
        assert not reporter.flush(0.2, level="broker")
        broker.send(signal.SIGCONT)
        assert reporter.flush(200.0, level="sink")
        assert sink.count().received == 2010


def test_a_restarted_sink_that_keeps_state_takes_nothing_twice(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    taken: list[int] = []

    def open_sink() -> Sink:
        return Sink(broker.url, state=tmp_path / "sink", on_record=lambda _, record: taken.append(record.seq))

    with open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        with open_sink():
            source.predict(200)
            assert reporter.flush(200.0, level="sink")
        source.predict(200)
        assert reporter.flush(200.0, level="broker")
        with Listener(broker.url, topics("pi-07").records) as listener, open_sink() as sink:
            assert reporter.flush(200.0, level="sink")
            wait_until(lambda: listener.messages)
            payload = next(payload for _, payload, _ in listener.messages)
            listener.publish(topics("pi-07").records, payload)
            wait_until(lambda: sink.count().duplicates >= len(decode_batch(payload).records))
            count = sink.count()
            assert (count.received, count.gaps, count.missing) == (400, 0, 0)
            assert count.streams[0].since_seq == 1
    assert taken == list(range(1, 401))


def test_a_handler_that_fails_gets_the_record_again(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    calls: list[int] = []

    def handler(_device: str, record: Record) -> None:
        calls.append(record.seq)
        if calls.count(7) == 1 and record.seq == 7:
            raise ValueError("the database is locked")

    with Sink(broker.url, on_record=handler) as sink, open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(20)
        assert reporter.flush(200.0, level="sink")
        assert sink.count().failed == 1
        assert sink.count().received == 20
    assert sorted(calls) == sorted([*range(1, 21), 7])


def test_kill_9_of_the_device_leaves_an_exact_account_and_a_gap_at_most(broker: Mosquitto, tmp_path: Path) -> None:
    device = ("support.reporting_device", broker.url, str(tmp_path / "state"), "pi-07")
    rng = random.Random(3)
    with Sink(broker.url) as sink:
        for _ in range(3):
            with running(*device) as child:
                assert child.stdout is not None
                lines = [child.stdout.readline() for _ in range(rng.randrange(2, 30))]
                child.kill()
                lines += [line for line in child.stdout.readlines() if line.endswith("\n")]
            assert all(line.startswith("done 1 ") for line in lines)
            enqueued, delivered = (int(word) for word in lines[-1].split()[2:])
            with Spool(tmp_path / "state" / "telemetry" / "pi-07.sqlite") as spool:
                account = spool.account()
                assert account.enqueued == account.delivered + account.pending + account.dropped
                assert account.enqueued >= enqueued
                assert account.delivered >= delivered
        with open_reporter(broker.url, tmp_path) as reporter:
            reporter.event("back")
            assert reporter.flush(200.0, level="sink")
            account, count = reporter.account(), sink.count()
        assert account.enqueued == account.delivered == count.received
        assert (account.pending, account.dropped) == (0, 0)
        assert count.missing == 0
        assert count.gaps >= 3, "each kill is seen"
        stream = count.streams[0]
        assert stream.last_seq - stream.since_seq + 1 == count.received + count.gaps


def test_birth_farewell_and_last_will_are_retained(broker: Mosquitto, tmp_path: Path) -> None:
    def status() -> dict[str, Any]:
        with Listener(broker.url, topics("pi-07").status) as listener:
            wait_until(lambda: listener.messages)
            topic, payload, retained = listener.messages[0]
        assert topic == "outrider/v1/pi-07/status"
        return decode_status(payload) if retained else status()  # told while it listened: what is kept comes next time

    with open_reporter(broker.url, tmp_path) as reporter:
        assert_connected(reporter)
        assert reporter.flush(200.0)
        wait_until(lambda: status()["state"] == "online")
        birth = status()
        assert birth["device"] == "pi-07"
        assert birth["stream"] == reporter.spool.stream
    wait_until(lambda: status()["reason"] == "closed")
    assert status()["state"] == "offline"
    device = ("support.reporting_device", broker.url, str(tmp_path / "state"), "pi-07")
    with running(*device) as child:
        wait_until(lambda: status()["state"] == "online")
        child.kill()
    wait_until(lambda: status()["state"] == "offline")
    will = status()
    assert (will["reason"], will["stream"]) == ("lost", birth["stream"])


def assert_connected(reporter: Reporter) -> None:
    wait_until(lambda: reporter.connected, what=reporter.last_error)


def test_what_overflows_memory_is_lost_counted_and_a_gap_at_the_consumer(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    with (
        Sink(broker.url) as sink,
        open_reporter(broker.url, tmp_path, queue_size=100, commit_interval_ms=3_600_000.0) as reporter,
    ):
        reporter.watch(source)
        source.predict(130)
        assert not reporter.event("too late")
        assert reporter.flush(200.0)
        source.predict(1)
        assert reporter.flush(200.0, level="sink")
        account, count = reporter.account(), sink.count()
        assert (account.offered, account.lost, account.enqueued) == (132, 31, 101)
        assert (count.received, count.gaps) == (101, 31)


def test_under_a_flood_records_go_on_to_the_disk_and_all_are_counted(tmp_path: Path, source: Source) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            source.predict(50)

    with open_reporter("mqtt://127.0.0.1:1", tmp_path, queue_size=50, commit_interval_ms=1.0) as reporter:
        reporter.watch(source)
        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(5):
                before = reporter.account().enqueued
                wait_until(lambda before=before: reporter.account().enqueued > before + 50)
                assert reporter.flush(200.0)
            wait_until(lambda: reporter.account().lost > 0)
        finally:
            stop.set()
            thread.join()
        assert reporter.flush(200.0)
        account = reporter.account()
        assert account.offered == account.enqueued + account.lost
        assert reporter.spool.last_seq == account.offered


def test_what_the_byte_cap_drops_is_counted_at_both_ends(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    with open_reporter(
        broker.url,
        tmp_path,
        max_bytes=100_000,
        limits=Limits(batch_records=10, window_batches=1, receipt_timeout_s=0.2),
    ) as reporter:
        reporter.watch(source)
        source.predict(1)
        assert reporter.flush(200.0, level="broker")
        source.predict(2000)
        reporter.event("important")
        assert not reporter.flush(200.0), "records were dropped"
        dropped = reporter.account().dropped
        assert dropped > 1000
        with Sink(broker.url) as sink:
            wait_until(lambda: reporter.account().pending == 0)
            account, count = reporter.account(), sink.count()
        assert (account.enqueued, account.dropped) == (2002, dropped)
        assert count.received == account.delivered == 2002 - dropped
        assert count.gaps == dropped


def test_hostile_messages_are_counted_and_harm_nobody(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    rng, all_heard = random.Random(5), threading.Event()
    mine = topics("pi-07")
    last = Attachment(subscriptions=("last",), message=lambda *_: all_heard.set())
    with (
        Sink(broker.url) as sink,
        open_reporter(broker.url, tmp_path, attachments=[last]) as reporter,
        Listener(broker.url, mine.records) as listener,
    ):
        reporter.watch(source)
        source.predict(10)
        assert reporter.flush(200.0, level="sink")
        payload = listener.messages[0][1]
        hostile = [b"", b"{}", b"\xff", b"[" * 50_000, payload[:-1], payload.replace(b"pi-07", b"pi-08")]
        for _ in range(100):
            data = bytearray(payload)
            data[rng.randrange(len(data))] = rng.randrange(256)
            hostile.append(bytes(data))
        for data in hostile:
            listener.publish(mine.records, data)
            listener.publish(mine.receipt, data)
        forged = Receipt(stream=reporter.spool.stream, ranges=(Range(1, 2**63 - 1),))
        foreign = Receipt(stream=a_stream(), ranges=(Range(1, 100),))
        for receipt in (forged, foreign):
            listener.publish(mine.receipt, encode_receipt(receipt))
        listener.publish("last", b"")
        assert all_heard.wait(120), "the forged receipt came before what is sent now"
        source.predict(10)
        assert reporter.flush(200.0, level="sink")
        account = reporter.account()
        assert (account.enqueued, account.delivered, account.pending) == (20, 20, 0)
        wait_until(lambda: sink.count().malformed >= 6)
        mine_only = [stream for stream in sink.count().streams if stream.stream == reporter.spool.stream]
        assert mine_only[0].received >= 20


def test_a_receipt_for_what_was_not_sent_delivers_nothing(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    limits = Limits(batch_records=10, window_batches=1, receipt_timeout_s=3600.0)
    mine = topics("pi-07")
    with (
        open_reporter(broker.url, tmp_path, limits=limits) as reporter,
        Listener(broker.url, mine.records) as listener,
    ):
        reporter.watch(source)
        source.predict(100)
        assert reporter.flush(200.0)
        wait_until(lambda: listener.messages)
        sent = decode_batch(listener.messages[0][1])
        receipt = Receipt(stream=sent.stream, ranges=(Range(1, 1000),))
        listener.publish(mine.receipt, encode_receipt(receipt))
        wait_until(lambda: reporter.account().delivered == len(sent.records))
        assert reporter.account().pending == 100 - len(sent.records)


def test_after_a_clean_stop_the_next_life_sends_the_rest_without_a_gap(
    broker: Mosquitto, tmp_path: Path, source: Source
) -> None:
    with open_reporter("mqtt://127.0.0.1:1", tmp_path) as reporter:
        reporter.watch(source)
        source.predict(30)
    with Sink(broker.url) as sink, open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(30)
        assert reporter.flush(200.0, level="sink")
        assert (reporter.account().offered, reporter.account().enqueued) == (30, 60)
        assert (sink.count().received, sink.count().gaps) == (60, 0)


def test_a_corrupt_spool_is_reported_in_the_new_stream(broker: Mosquitto, tmp_path: Path) -> None:
    path = tmp_path / "state" / "telemetry" / "pi-07.sqlite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x00garbage" * 1000)
    events: list[Record] = []
    with (
        Sink(broker.url, on_record=lambda _, record: events.append(record)),
        open_reporter(broker.url, tmp_path) as reporter,
    ):
        assert reporter.spool.recovered
        assert reporter.flush(200.0, level="sink")
    assert [record.body["name"] for record in events] == ["spool_recovered"]


def test_the_sink_as_a_program_prints_its_count_at_sigterm(broker: Mosquitto, tmp_path: Path, source: Source) -> None:
    with running("outrider.telemetry.sink", "--broker", broker.url, "--json") as sink:
        with open_reporter(broker.url, tmp_path) as reporter:
            reporter.watch(source)
            source.predict(25)
            assert reporter.flush(200.0, level="sink")
        sink.send_signal(signal.SIGTERM)
        out, err = sink.communicate(timeout=120)
    assert sink.returncode == 0
    count = json.loads(out)
    assert (count["received"], count["gaps"], count["malformed"]) == (25, 0, 0)
    assert count["streams"][0]["device"] == "pi-07"
    assert "Warning" not in err


def test_the_sink_as_a_program_names_a_wrong_url() -> None:
    command = [sys.executable, "-m", "outrider.telemetry.sink", "--broker", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: broker url")
    assert "hint: " in done.stderr
