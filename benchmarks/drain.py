"""A drain over the network beside paho with one record a message, and what the telemetry's benchmarks share."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import paho.mqtt.client as paho

import outrider
from benchmarks.measure import TWIN
from benchmarks.stats import ratio
from outrider.telemetry.record import encode_row
from outrider.telemetry.spool import LOW, Draft, Spool
from outrider_runtimes.runner import Timing
from support.broker import Mosquitto, wait_until

DRAINED, DRAINED_RAW, DRAIN_ROUNDS, DRAIN_TWIN_LIMIT = 60_000, 20_000, 4, 0.1

LISTEN = """
import sys
import paho.mqtt.client as paho

def listen(name, topic):
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name)
    client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
    client.on_subscribe = lambda *_: print("listens", flush=True)
    client.on_message = take
    client.connect("127.0.0.1", int(sys.argv[1]))
    client.loop_forever()
"""

CONSUMER = f"""{LISTEN}
import json
left = int(sys.argv[2])

def take(client, data, message):
    global left
    json.loads(message.payload)
    left -= 1
    if not left:
        print("all", flush=True)

listen("raw-consumer", "raw")
"""

RECEIPTS = f"""{LISTEN}
import re

def take(client, data, message):
    stream, first, *_ = re.search(rb'"stream":"([^"]+)".*?"seq":([0-9]+)', message.payload, re.DOTALL).groups()
    last = re.match(rb'[0-9]+', message.payload[message.payload.rindex(b'{{"seq":') + 7:])[0]
    receipt = b'{{"v":1,"stream":"%b","ranges":[[%b,%b]]}}' % (stream, first, last)
    client.publish(message.topic.replace("records", "receipt"), receipt, qos=1)

listen("receipts", "outrider/v1/+/records")
"""


def make_record() -> bytes:
    """A prediction as the spool stores it."""
    body = {"source": "cloud", "reason": "uncertain", "variant": "onnx-float32", "engine": "onnxruntime"}
    more = {"bundle": "ab" * 32, "verified": True, "timing_ms": Timing(infer=1.25, network=12.5, total=14.1)._asdict()}
    boot = "0b7c1f56-3f7e-4a58-9d6c-2a1e5f40c3d2"
    return encode_row(kind="prediction", boot_id=boot, wall_s=1.7e9, monotonic_s=312.004417, body=body | more)


def drain(broker: Mosquitto, folder: Path) -> dict[str, Any]:
    """From the first record to the last, ours and paho's with one record a message, in turn, each in two ways.

    To the broker: until it has confirmed all. Nobody takes paho's; ours goes no further than its receipts, so that a
    consumer answers, which reads nothing but the numbers. To a consumer in a process of its own: ours until the sink
    has read, checked and counted the last record and its receipt is in the spool; paho's until a consumer has read it.
    Ours has the opening of the spool and the connect in its time; paho's begins when it is connected.
    """
    names = ("ours", "paho", "paho" + TWIN, "ours, to a consumer", "paho, to a consumer")
    us: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(4)
    for number in range(DRAIN_ROUNDS):
        for name in rng.permutation(names):
            consumed = name.endswith("to a consumer")
            if name.startswith("ours"):
                device = f"drain-{number}-{'sink' if consumed else 'broker'}"
                us[name].append(_ours(broker, folder, device, consumed=consumed) / DRAINED * 1e6)
            else:
                us[name].append(_paho(broker, consumed=consumed) / DRAINED_RAW * 1e6)
    columns = {name: np.array(taken).reshape(-1, 1) for name, taken in us.items()}
    twin = ratio(columns["paho" + TWIN], columns["paho"], rng)
    return {
        "records": DRAINED,
        "records_raw": DRAINED_RAW,
        "rounds": DRAIN_ROUNDS,
        "us_a_record": us,
        "records_a_second": {name: 1e6 / float(np.median(taken)) for name, taken in us.items()},
        "times_paho": {
            "to the broker": vars(ratio(columns["paho"], columns["ours"], rng)),
            "to a consumer": vars(ratio(columns["paho, to a consumer"], columns["ours, to a consumer"], rng)),
            "to a consumer over to the broker": vars(ratio(columns["paho"], columns["ours, to a consumer"], rng)),
        },
        "twin": vars(twin),
        "valid": abs(twin.value - 1.0) <= DRAIN_TWIN_LIMIT,
    }


def _ours(broker: Mosquitto, folder: Path, device: str, *, consumed: bool) -> float:
    """Seconds from a reporter's opening on a full spool until the broker has all, or until the sink's receipts say
    that it has."""
    fill(folder / "telemetry" / f"{device}.sqlite", DRAINED)
    with sink(broker.url) if consumed else _listening(RECEIPTS, broker.port):
        begun = time.perf_counter()
        with outrider.Reporter(broker.url, device=device, state=folder, metrics_interval_s=None) as reporter:
            if not reporter.flush(120.0, level="sink" if consumed else "broker"):
                raise RuntimeError(f"the drain did not end: {reporter.account()}")
            return time.perf_counter() - begun


def fill(path: Path, count: int) -> None:
    """A spool in which so many thousand records wait."""
    with Spool(path) as spool:
        draft = Draft(body=make_record(), priority=LOW)
        for _ in range(count // 1000):
            spool.append([draft] * 1000)


@contextlib.contextmanager
def sink(url: str) -> Iterator[None]:
    """The consumer in a process of its own, once it listens."""
    command = [sys.executable, "-m", "outrider.telemetry.sink", "--broker", url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as sink:
        assert sink.stderr is not None
        if not any("connected" in line for line in sink.stderr):
            raise RuntimeError("the sink did not connect")
        try:
            yield
        finally:
            sink.terminate()


def _paho(broker: Mosquitto, *, consumed: bool) -> float:
    """Seconds for one record a message with QoS 1, as its users write it, until the broker or a consumer has all."""
    with contextlib.ExitStack() as stack:
        consumer = stack.enter_context(_listening(CONSUMER, broker.port, DRAINED_RAW)) if consumed else None
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="raw")
        client.max_queued_messages_set(0)
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        wait_until(client.is_connected)
        record = make_record()
        begun = time.perf_counter()
        sent = [client.publish("raw", record, qos=1) for _ in range(DRAINED_RAW)]
        for each in sent:
            each.wait_for_publish(120.0)
        if consumer is not None and consumer.readline() != "all\n":
            raise RuntimeError("the consumer ended before it had all")
        taken = time.perf_counter() - begun
        client.disconnect()
        client.loop_stop()
    return taken


@contextlib.contextmanager
def _listening(program: str, *arguments: int) -> Iterator[IO[str]]:
    """A consumer in a process of its own, once it listens. Gives what it says."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "listens\n":
                raise RuntimeError("the consumer did not connect")
            yield process.stdout
        finally:
            process.terminate()
