"""Whatever a program tells a reporter: every payload that really goes out is what docs/telemetry.schema.json says."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.agent.commands import KINDS, Acknowledgement, acknowledgement_topic, command_topic
from outrider.agent.sender import Sender
from outrider.prediction import Prediction
from outrider.telemetry import InputPolicy, Limits, Reporter, Sink
from outrider.telemetry.mqtt import parse_broker
from outrider.telemetry.record import MAX_PAYLOAD_BYTES, decode_batch, topics
from outrider_runtimes import strictjson
from outrider_runtimes.errors import DeadlineExceeded, ShapeError, TelemetryError
from outrider_runtimes.heat import Heat
from outrider_runtimes.runner import Timing
from outrider_runtimes.tensors import Interface, TensorSpec
from support.agents import DEVICE, AgentProcess, Home, board, until_heard
from support.broker import Mosquitto, wait_until
from support.keys import private_key
from support.listener import Listener
from support.telemetry import Source, a_prediction
from support.telemetry_schema import complaints

pytestmark = pytest.mark.slow

# The last part of a topic, and what the schema calls that payload.
PAYLOADS = {"status": "status", "info": "info", "records": "batch", "receipt": "receipt", "vitals": "vitals"}
TEXTS = ("", "a", "\N{SNOWMAN}" * 9, "\U0001f600", "\0\x1f\x7f", '"\\', "x" * 300, "</script>", "\ud800", "1", "null")
NUMBERS = (0, -0.0, 1, -1, 2**63, -(2**70), 1e-320, 1.7e308, 0.1, float("nan"), float("inf"), True, None)
DTYPES = ("float32", ">f4", "int8", ">i8", "bool", "uint16", "float64", "object", "<U3")
ERRORS = (DeadlineExceeded("late"), ShapeError("wrong"), ValueError("x"), type("\u00c4rger", (Exception,), {})("odd"))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


class Watched(Source):
    """A source with a bundle and an interface."""

    interface = Interface(
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 2)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 4)),),
        labels=("a", "\N{SNOWMAN}", "", "d" * 500),
    )
    bundle = type("Info", (), {"name": "digits", "version": 3, "digest": "ab" * 32, "verified": False})()
    variant, engine = "onnx-int8", "onnxruntime"


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 4 else 2)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind < 4:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*TEXTS, *NUMBERS)): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def any_prediction(rng: random.Random) -> Prediction:
    times = [rng.choice((0.0, 1e-9, 1.25, 1e9, 1.7e308)) if rng.random() < 0.5 else rng.random() for _ in range(6)]
    if rng.random() < 0.05:
        times[rng.randrange(6)] = rng.choice((float("nan"), float("inf")))
    rows = rng.choice((0, 1, 3, 70, 2000))
    logits = np.array([[rng.choice((0.0, 1.0, -3e38, float("nan"))) for _ in range(4)]] * rows, np.float32)
    return Prediction(
        outputs={"logits": logits.reshape(rows, 4)},
        source=rng.choice(("edge", "cloud", "edge_degraded")),
        reason=rng.choice(("local", "uncertain", "cloud_late", *TEXTS)),
        variant=rng.choice(("onnx-int8", *TEXTS)),
        engine="onnxruntime",
        bundle="ab" * 32,
        verified=rng.random() < 0.5,
        timing_ms=Timing(*times),
    )


def any_inputs(rng: random.Random) -> dict[str, Any]:
    made = {}
    for number in range(rng.choice((1, 1, 2, 300))):
        shape = rng.choice(((), (0,), (1, 2), (3, 1, 4), (30, 100)))
        made[rng.choice(TEXTS[:-3]) + str(number)] = np.zeros(shape).astype(rng.choice(DTYPES))
    return made


def tell_anything(reporter: Reporter, source: Watched, rng: random.Random) -> None:
    """One thing, or more; what has no form is refused, and by nothing but a TelemetryError."""
    source_says = any_prediction(rng)
    for callback in list(source.callbacks):
        callback(source_says)
    reporter.report_inputs(any_inputs(rng), a_prediction())
    reporter.failure(rng.choice(ERRORS))
    with contextlib.suppress(TelemetryError):
        reporter.event(any_value(rng) if rng.random() < 0.2 else "event", value=any_value(rng))


def test_every_payload_that_goes_out_is_what_the_schema_says(broker: Mosquitto, tmp_path: Path) -> None:
    rng, source = random.Random(11), Watched()
    warm = iter([Heat(celsius=float("nan")), Heat(celsius=-40.0, throttled=True)])
    with (
        Listener(broker.port, "outrider/v1/#") as listener,
        Sink(broker.url) as sink,
        Reporter(
            broker.url,
            device="pi-07",
            state=tmp_path / "state",
            commit_interval_ms=20.0,
            metrics_interval_s=0.1,
            inputs=InputPolicy(flagged_only=False, max_bytes=45_000, per_hour=1_000_000),
            limits=Limits(batch_bytes=10**6, batch_records=1000),
            home_assistant=True,
            heat=lambda: next(warm, Heat(celsius=51.5, throttled=False)),
        ) as reporter,
    ):
        wait_until(lambda: sink.connected and reporter.connected)
        reporter.watch(source)
        for _ in range(600):
            tell_anything(reporter, source, rng)
        assert reporter.flush(200.0, level="sink")
        account = reporter.account()
        assert (account.poisoned, sink.count().malformed) == (0, 0)
        assert account.delivered > 1000
        wait_until(lambda: any(b'"kind":"metrics"' in each.payload for each in list(listener.heard)))
        status = topics("pi-07").status
        reporter.close()
        wait_until(lambda: b'"closed"' in listener.on(status)[-1].payload)
    seen: Counter[str] = Counter()
    for message in listener.heard:
        what = message.topic.rsplit("/", 1)[1]
        said = strictjson.parse(message.payload, TelemetryError, max_bytes=MAX_PAYLOAD_BYTES, max_depth=64)
        assert complaints(PAYLOADS[what], said) == []
        seen[what] += 1
        if what == "records":
            assert decode_batch(message.payload).malformed == 0
            seen.update(record["kind"] for record in said["records"])
    assert {*PAYLOADS, "prediction", "event", "input", "metrics"} <= set(seen), "each of them was seen"


def told(home: Home) -> Iterator[Acknowledgement]:
    """What a real agent says to every command, and to those that it does not take."""
    broker = parse_broker(home.broker_url)
    operator = Sender(broker=broker, device=DEVICE, key=private_key(1), timeout_s=150.0, expires_s=3600.0)
    stranger = Sender(broker=broker, device=DEVICE, key=private_key(2), timeout_s=150.0, expires_s=3600.0)
    until_heard(operator)
    yield operator.send("ping")
    yield operator.send("install", {"file": "tiny-2.outrider", "digest": home.second})
    yield operator.send("rollback")
    yield operator.send("pause")
    yield operator.send("stats")
    yield operator.send("resume")
    yield operator.send("set_policy", {"policy": {"min_margin": 0.25, "offload_when_queued": False}})
    yield operator.send("set_policy", {"policy": {"min_margin": 7}})
    yield operator.send("install", {"file": "none.outrider"})
    yield operator.send("install", {"file": "cut.outrider"})
    yield stranger.send("pause")


def test_every_command_and_what_an_agent_says_of_it_is_what_the_schema_says(tmp_path: Path) -> None:
    with board(tmp_path) as home, Listener(int(home.broker_url.rsplit(":", 1)[1]), "outrider/v1/#") as listener:
        home.configure(more='[cloud]\nurl = "http://127.0.0.1:9"\nmodel = "large"\n[policy]\ndeadline_ms = 50000\n')
        (home.folder / "bundles" / "cut.outrider").write_bytes(b"cut")
        with AgentProcess(home) as agent:
            home.put("one", 1)
            said = list(told(home))
            wait_until(lambda: said[-1].command in listener.on(acknowledgement_topic(DEVICE))[-1].payload.decode())
            agent.stop()
    assert [each.result for each in said] == [*(7 * ["ok"]), "refused", "refused", "failed", "refused"]
    assert {each.name for each in said} == set(KINDS)
    for message in listener.heard:
        what = message.topic.rsplit("/", 1)[1]
        assert complaints(PAYLOADS.get(what, what), json.loads(message.payload)) == []
    texts = [json.loads(json.loads(each.payload)["command"]) for each in listener.on(command_topic(DEVICE))]
    assert [complaint for text in texts for complaint in complaints("command_text", text)] == []
    answered = {json.loads(each.payload)["command"] for each in listener.on(acknowledgement_topic(DEVICE))}
    assert {each.command for each in said} <= answered <= {text["id"] for text in texts}
