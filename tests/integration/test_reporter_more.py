"""What a reporter does beside reporting predictions: metrics, events, inputs, attachments, poison, a metered link."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.events import HybridEvent
from outrider.hybrid import Hybrid
from outrider.policy import Budget, Policy
from outrider.prediction import Prediction
from outrider.serving import Change
from outrider.spending import open_meter
from outrider.telemetry import Attachment, InputPolicy, Limits, Message, Record, Reporter, Sink
from outrider.telemetry.record import decode_info, topics
from outrider_runtimes.errors import ConfigError, DeadlineExceeded
from outrider_runtimes.heat import Heat
from outrider_runtimes.runner import Served
from outrider_runtimes.tensors import Interface, TensorSpec
from support.amqtt_broker import running_amqtt
from support.broker import Mosquitto, wait_until
from support.listener import Listener
from support.ports import free_port
from support.runners import NumpyRunner
from support.telemetry import Source, a_prediction
from support.telemetry_schema import complaints
from support.telemetry_trials import Impatient

pytestmark = pytest.mark.slow

QUICK = Limits(receipt_timeout_s=0.3, batch_records=50)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


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


class Teller(Source):
    """A source with an interface, which tells events as a Hybrid does."""

    interface = Interface(
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 2)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 10)),),
        labels=tuple("abcdefghij"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[HybridEvent], None]] = []

    def on_event(self, callback: Callable[[HybridEvent], None]) -> Callable[[], None]:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    def say(self, prediction: Prediction) -> None:
        for callback in list(self.callbacks):
            callback(prediction)


def sure_of(number: int, **changes: Any) -> Prediction:
    logits = np.zeros((1, 10), np.float32)
    logits[0, number] = 9.0
    return a_prediction(4)._replace(outputs={"logits": logits}, **changes)


def everything(url: str, reporter: Reporter) -> list[Record]:
    """What a consumer gets of all that was offered."""
    records: list[Record] = []
    with Sink(url, on_record=lambda _, record: records.append(record)):
        assert reporter.flush(200.0, level="sink")
    return records


def told_at_last(records: list[Record]) -> tuple[int, int, float | None]:
    """Predictions and failures in all metrics records, as an interval may end among them, and the last one's drift."""
    metrics = [record.body for record in records if record.kind == "metrics"]
    failed = sum(body["failures"].get("DeadlineExceeded", 0) for body in metrics)
    return sum(body["predictions"] for body in metrics), failed, metrics[-1]["drift"] if metrics else None


def test_metrics_count_all_and_full_records_are_a_sample_and_the_flagged(broker: Mosquitto, tmp_path: Path) -> None:
    source = Teller()
    with open_reporter(
        broker.url,
        tmp_path,
        sample=0.1,
        metrics_interval_s=0.5,
        heat=lambda: Heat(celsius=61.5, throttled=False),
        rng=random.Random(3),
    ) as reporter:
        reporter.watch(source)
        for _ in range(400):
            source.say(sure_of(3))
        for _ in range(20):
            source.say(sure_of(4, source="cloud", reason="uncertain"))
            source.say(sure_of(5, source="edge_degraded", reason="cloud_late"))
        assert reporter.failure(DeadlineExceeded("in /home/me"))
        source.listeners[0](HybridEvent(name="drift", fields={"share": 0.25, "bound": 0.1}))
        wait_until(lambda: reporter.account().enqueued > 0 and reporter.flush(1.0))
        records = []
        wait_until(lambda: records.extend(everything(broker.url, reporter)) or told_at_last(records) == (440, 1, 0.25))
        account = reporter.account()
    assert account.offered == account.enqueued + account.aggregated + account.lost
    full = [record.body for record in records if record.kind == "prediction"]
    flagged = [body for body in full if body["reason"] in ("uncertain", "cloud_late")]
    assert len(flagged) == 40
    assert 15 <= len(full) - len(flagged) <= 70, "a tenth of 400"
    metrics = [record.body for record in records if record.kind == "metrics"]
    assert sum(body["predictions"] for body in metrics) == 440
    assert sum(body["failures"].get("DeadlineExceeded", 0) for body in metrics) == 1
    counted = next(body for body in metrics if body["predictions"])
    assert counted["classes"]["top"][0][0] == "d"
    assert counted["confidence"]["count"] == counted["predictions"]
    assert (metrics[-1]["temperature_c"], metrics[-1]["drift"]) == (61.5, 0.25)
    events = [record.body for record in records if record.kind == "event"]
    assert {"name": "inference_failed", "fields": {"error": "DeadlineExceeded"}} in events
    assert {"name": "drift", "fields": {"share": 0.25, "bound": 0.1}} in events
    for record in records:
        assert complaints(record.kind, record.body) == []


def test_at_close_what_was_counted_is_reported(broker: Mosquitto, tmp_path: Path) -> None:
    source = Teller()
    with open_reporter(broker.url, tmp_path, sample=0.0, metrics_interval_s=3600.0) as reporter:
        reporter.watch(source)
        source.predict(25)
    with open_reporter(broker.url, tmp_path, metrics_interval_s=3600.0) as reporter:
        (record,) = everything(broker.url, reporter)
        assert (record.kind, record.body["predictions"]) == ("metrics", 25)
        assert reporter.account().enqueued == 1, "nothing happened since"


def test_a_model_that_serves_something_else_is_an_event_without_paths(broker: Mosquitto, tmp_path: Path) -> None:
    class Ladder(Source):
        def on_change(self, callback: Callable[[Change], None]) -> Callable[[], None]:
            self.change = callback
            return lambda: None

    def served(variant: str) -> Served:
        return Served(variant=variant, engine="litert", bundle="ab" * 32, verified=True)

    source = Ladder()
    with open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        reason = "cannot open '/var/lib/outrider/blobs/x.tflite'"
        source.change(Change(kind="rollback", reason=reason, before=served("new"), after=served("old")))
        (record,) = everything(broker.url, reporter)
    assert record.body["name"] == "rollback"
    assert record.body["fields"]["reason"] == "cannot open '...'"
    assert (record.body["fields"]["variant"], record.body["fields"]["variant_before"]) == ("old", "new")


@pytest.mark.parametrize(("synced", "said"), [(True, False), (None, False), (False, True)])
def test_records_of_a_clock_that_nothing_keeps_say_so(
    broker: Mosquitto, tmp_path: Path, synced: bool | None, said: bool
) -> None:
    source = Source()
    with open_reporter(broker.url, tmp_path, synchronised=lambda: synced) as reporter:
        reporter.watch(source)
        source.predict(2)
        reporter.event("x")
        assert [record.clock_unsynced for record in everything(broker.url, reporter)] == [said] * 3


def test_inputs_leave_only_where_the_program_and_the_policy_say_so(broker: Mosquitto, tmp_path: Path) -> None:
    image = {"image": np.array([[0.5, 0.25]], np.float32)}
    unsure = sure_of(1, reason="uncertain", source="cloud")
    with open_reporter(broker.url, tmp_path) as reporter:
        assert not reporter.report_inputs(image, unsure)
    with open_reporter(broker.url, tmp_path, inputs=InputPolicy(per_hour=1)) as reporter:
        assert not reporter.report_inputs(image, sure_of(1))
        assert reporter.report_inputs(image, unsure)
        assert not reporter.report_inputs(image, unsure), "one an hour"
        image["image"][:] = 0.0  # it is the caller's
        (record,) = everything(broker.url, reporter)
    assert record.kind == "input"
    assert record.body["tensors"] == [
        {"name": "image", "dtype": "float32", "shape": [1, 2], "data": "AAAAPwAAgD4="},
    ]


def test_attachments_share_the_connection_and_a_broken_one_harms_nobody(broker: Mosquitto, tmp_path: Path) -> None:
    heard: list[tuple[str, bytes, bool]] = []
    ups: list[int] = []

    def broken(*_: object) -> None:
        raise ValueError("mine")

    mine = Attachment(
        subscriptions=("home/+/state",),
        up=lambda: ups.append(1),
        message=lambda topic, payload, retained: heard.append((topic, payload, retained)),
    )
    with open_reporter(broker.url, tmp_path, device="other") as other:
        assert other.post(Message(topic="home/old/state", payload=b"kept", retain=True))
        with Listener(broker.port, "home/old/state") as kept:
            wait_until(lambda: kept.heard)
        bad = Attachment(subscriptions=("home/+/state",), up=broken, message=broken)
        with open_reporter(broker.url, tmp_path, attachments=[bad, mine]) as reporter:
            wait_until(lambda: heard)
            assert heard == [("home/old/state", b"kept", True)]
            for number in range(200):
                assert other.post(Message(topic="home/lamp/state", payload=b"%d" % number))
            wait_until(lambda: len(heard) == 201)
            assert [payload for _, payload, _ in heard[1:]] == [b"%d" % number for number in range(200)]
            assert not heard[1][2]
            source = Source()
            reporter.watch(source)
            source.predict(10)
            assert len(everything(broker.url, reporter)) == 10
            broker.restart()
            wait_until(lambda: len(ups) == 2)
        assert not reporter.post(Message(topic="home/lamp/state", payload=b"late")), "it is closed"


def test_posts_wait_for_a_broker_and_are_bounded(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "mosquitto")
    heard: list[bytes] = []
    listening = Attachment(subscriptions=("t",), message=lambda _topic, payload, _retained: heard.append(payload))
    with open_reporter(broker.url, tmp_path, attachments=[listening]) as reporter:
        taken = [reporter.post(Message(topic="t", payload=b"%d" % number)) for number in range(300)]
        assert taken == [True] * 256 + [False] * 44
        with broker:
            wait_until(lambda: len(heard) >= 256)
            assert heard == [b"%d" % number for number in range(256)]


def test_a_subscription_that_is_refused_to_an_attachment_does_not_end_the_connection(tmp_path: Path, caplog) -> None:
    with running_amqtt() as url:
        wrong = Attachment(subscriptions=("prohibited",))
        with open_reporter(url, tmp_path, attachments=[wrong]) as reporter:
            wait_until(lambda: reporter.connected, what=reporter.last_error)
        assert "refused a subscription to prohibited" in caplog.text


class Bundled(Source):
    """What a Model is to the info message."""

    def __init__(self) -> None:
        super().__init__()
        self.interface = Teller.interface
        self.bundle = type("Info", (), {"name": "digits", "version": 3, "digest": "ab" * 32, "verified": True})()
        self.variant, self.engine = "onnx-int8", "onnxruntime"


def test_what_a_device_is_is_retained(broker: Mosquitto, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def listen(topic: str, payload: bytes, retained: bool) -> None:
        if retained:
            assert complaints("info", json.loads(payload)) == []
            told.append(decode_info(payload))

    with open_reporter(broker.url, tmp_path) as reporter:
        with Listener(broker.port, topics("pi-07").info) as kept:
            wait_until(lambda: kept.heard)
        unwatch = reporter.watch(Bundled())
        assert reporter.flush(200.0)

        def latest() -> dict[str, Any]:
            told.clear()
            listening = Attachment(subscriptions=(topics("pi-07").info,), message=listen)
            with open_reporter(broker.url, tmp_path, device="other", attachments=[listening]):
                wait_until(lambda: told)
            return told[0]

        wait_until(lambda: latest()["bundles"])
        (bundle,) = told[0]["bundles"]
        unwatch()
        wait_until(lambda: not latest()["bundles"])
    assert (bundle["name"], bundle["version"], bundle["variant"]) == ("digits", 3, "onnx-int8")
    assert bundle["interface"] == Teller.interface.digest
    assert told[0]["board"]["cpus"] >= 1
    assert str(tmp_path) not in json.dumps(told)


def test_a_record_that_breaks_the_connection_is_set_aside_and_the_rest_arrives(tmp_path: Path) -> None:
    """mosquitto hangs up on a message that is larger than it allows."""
    with Mosquitto(tmp_path / "mosquitto", extra="max_packet_size 20000\n") as broker:
        seen: list[Record] = []
        with (
            Sink(broker.url, on_record=lambda _, record: seen.append(record)) as sink,
            open_reporter(
                broker.url, tmp_path, limits=Limits(batch_records=8, receipt_timeout_s=0.3, max_tries=3)
            ) as reporter,
        ):
            source = Source()
            reporter.watch(source)
            source.predict(20)
            reporter.event("small")
            reporter.event("huge", data="x" * 40_000)
            source.predict(20)
            wait_until(lambda: reporter.account().delivered == 42)
            account, count = reporter.account(), sink.count()
            assert (account.enqueued, account.dropped, account.delivered) == (43, 1, 42)
            told = [record.body for record in seen if record.body.get("name") == "record_poisoned"]
            assert told == [{"name": "record_poisoned", "fields": {"seq": 22, "tries": 3}}]
            assert (count.received, count.gaps, count.missing) == (42, 1, 0), "the consumer knows that 22 will not come"


def test_a_record_at_the_head_that_breaks_the_connection_is_set_aside(tmp_path: Path) -> None:
    """It waits before the broker is there, and is the first that is sent, in every connection."""
    port = free_port()
    limits = Limits(batch_records=8, receipt_timeout_s=0.3, max_tries=3)
    with open_reporter(f"mqtt://127.0.0.1:{port}", tmp_path, limits=limits) as reporter:
        reporter.event("huge", data="x" * 40_000)
        source = Source()
        reporter.watch(source)
        source.predict(40)
        assert reporter.flush(200.0)
        with Mosquitto(tmp_path / "mosquitto", extra="max_packet_size 20000\n", port=port) as broker:
            seen: list[Record] = []
            with Sink(broker.url, on_record=lambda _, record: seen.append(record)):
                wait_until(lambda: reporter.account().delivered == 41)
        account = reporter.account()
    assert (account.enqueued, account.delivered, account.dropped) == (42, 41, 1)
    assert [record.seq for record in seen if record.kind == "prediction"] == list(range(2, 42))
    assert [record.body["fields"] for record in seen if record.kind == "event"] == [{"seq": 1, "tries": 3}]


@pytest.mark.parametrize("bad", [1, 7])
def test_a_record_that_the_consumer_never_takes_is_set_aside(broker: Mosquitto, tmp_path: Path, bad: int) -> None:
    source = Source()

    def handler(_device: str, record: Record) -> None:
        if record.seq == bad:
            raise ValueError("this one, always")

    limits = Limits(batch_records=10, receipt_timeout_s=0.1, max_tries=3)
    with Sink(broker.url, on_record=handler) as sink, open_reporter(broker.url, tmp_path, limits=limits) as reporter:
        reporter.watch(source)
        source.predict(20)

        def one_more() -> bool:
            source.predict(1)
            return reporter.account().poisoned == 1

        wait_until(one_more)
        source.predict(5)
        assert reporter.flush(200.0, level="sink")
        account, count = reporter.account(), sink.count()
    assert account.enqueued == account.delivered + 1
    assert (account.pending, account.dropped) == (0, 1)
    assert (count.received, count.missing, count.gaps) == (account.delivered, 0, 1)


def test_a_budget_covers_offload_and_telemetry_together(broker: Mosquitto, tmp_path: Path) -> None:
    meter = open_meter(Budget(bytes_per_day=60_000), state=tmp_path / "state")
    unsure = {"x": np.zeros((1, 4), np.float32)}
    edge, cloud = NumpyRunner(), NumpyRunner()
    source = Source()
    with (
        Hybrid(edge, cloud, Policy(deadline_ms=20_000.0, min_margin=0.5), meter=meter) as hybrid,
        open_reporter(broker.url, tmp_path, meter=meter) as reporter,
        Sink(broker.url) as sink,
    ):
        wait_until(lambda: sink.connected)
        assert hybrid.infer(unsure).source == "cloud"
        reporter.watch(source)
        source.predict(500)
        assert reporter.flush(200.0)
        wait_until(lambda: reporter.held_back and sink.count().received)
        assert "budget" in reporter.held_back
        assert 0 < sink.count().received < 500
        assert reporter.account().pending > 0, "the rest waits"
        meter.close()
        spent = json.loads((tmp_path / "state" / "link.json").read_text())
        assert 1000 < spent["day_bytes"] <= 60_000
        assert spent["day_requests"] == 1
        meter.take_bytes(60_000 - spent["day_bytes"])
        said = hybrid.infer(unsure)
        assert (said.source, said.reason) == ("edge_degraded", "budget_spent")


def test_a_budget_that_is_smaller_than_a_batch_is_spent_too(broker: Mosquitto, tmp_path: Path) -> None:
    meter = open_meter(Budget(bytes_per_day=60_000), state=tmp_path / "state")
    source = Source()
    with (
        open_reporter(broker.url, tmp_path, meter=meter, limits=Limits(batch_bytes=10**6)) as reporter,
        Sink(broker.url) as sink,
    ):
        wait_until(lambda: sink.connected)
        reporter.watch(source)
        source.predict(2000)
        assert reporter.flush(200.0)
        wait_until(lambda: reporter.held_back and sink.count().received > 100)
        meter.close()
        spent = json.loads((tmp_path / "state" / "link.json").read_text())
        assert 60_000 * 15 // 16 < spent["day_bytes"] <= 60_000


def test_a_hybrid_takes_one_budget_not_two(tmp_path: Path) -> None:
    meter = open_meter(Budget(bytes_per_day=1), state=tmp_path)
    policy = Policy(deadline_ms=20_000.0, budget=Budget(bytes_per_day=1))
    with pytest.raises(ConfigError, match="exclude each other"):
        Hybrid(NumpyRunner(), NumpyRunner(), policy, meter=meter)


def test_a_drain_keeps_its_rate(broker: Mosquitto, tmp_path: Path) -> None:
    source = Source()
    rate = 200_000.0
    limits = Limits(batch_records=50, bytes_per_s=rate)
    with Sink(broker.url) as sink, open_reporter(broker.url, tmp_path, limits=limits) as reporter:
        wait_until(lambda: sink.connected and reporter.connected)
        reporter.watch(source)
        begun = time.monotonic()
        source.predict(2000)
        assert reporter.flush(200.0, level="sink")
        taken_s = time.monotonic() - begun
    size_bytes = 2000 * 300
    assert taken_s >= size_bytes / rate - 1.0, "a second's worth may go at once"
