"""What an agent's configuration says of its reports: batches, inputs within their bounds, and Sparkplug."""

from __future__ import annotations

import base64
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.telemetry import Record, Sink
from outrider.telemetry.record import Batch, decode_batch, topics
from support.agents import DEVICE, AgentProcess, Home, board, command
from support.broker import wait_until
from support.listener import Listener
from support.realbundles import images
from support.sparkplug import decode, violations

pytestmark = pytest.mark.slow

EVERY_INPUT = "[inputs]\nflagged_only = false\nper_hour = 3"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with board(tmp_path) as found:
        yield found


def port(home: Home) -> int:
    return int(home.broker_url.rpartition(":")[2])


def tensors(record: Record) -> dict[str, np.ndarray]:
    return {
        tensor["name"]: np.frombuffer(base64.b64decode(tensor["data"]), tensor["dtype"]).reshape(tensor["shape"])
        for tensor in record.body["tensors"]
    }


def test_inputs_are_reported_within_their_bounds_and_batches_are_as_small_as_asked(home: Home) -> None:
    home.configure(broker="batch_records = 2", more=EVERY_INPUT)
    records: list[Record] = []
    with (
        Listener(port(home), topics(DEVICE).records) as listener,
        Sink(home.broker_url, on_record=lambda device, record: records.append(record)),
        AgentProcess(home) as agent,
    ):
        for seed in range(5):
            home.put(str(seed), seed)
            home.outputs(str(seed))
        wait_until(lambda: [record.kind for record in records].count("prediction") == 5, what="all are on the disk")
        account = agent.stop()["account"]
        wait_until(lambda: len(records) >= account["enqueued"])

        def heard() -> list[Batch]:
            return [decode_batch(seen.payload) for seen in listener.on(topics(DEVICE).records)]

        wait_until(lambda: sum(len(batch.records) for batch in heard()) >= account["enqueued"])
        batches = heard()
    inputs = [record for record in records if record.kind == "input"]
    assert len(inputs) == 3  # of five: three an hour
    for seed, record in enumerate(inputs):
        np.testing.assert_array_equal(tensors(record)["image"], images(1, seed))
    assert max(len(batch.records) for batch in batches) == 2


def test_no_input_leaves_unless_the_file_says_so_and_a_reload_may_say_so(home: Home) -> None:
    records: list[Record] = []
    with (
        Sink(home.broker_url, on_record=lambda device, record: records.append(record)),
        AgentProcess(home) as agent,
    ):
        home.put("0", 0)
        home.outputs("0")
        home.configure(more=EVERY_INPUT)
        agent.send(signal.SIGHUP)
        agent.wait_for("reloaded")
        home.put("1", 1)
        home.outputs("1")
        wait_until(lambda: {"prediction": 2, "input": 1}.items() <= Counter(record.kind for record in records).items())
        account = agent.stop()["account"]
        wait_until(lambda: len(records) >= account["enqueued"])
    (record,) = [record for record in records if record.kind == "input"]
    np.testing.assert_array_equal(tensors(record)["image"], images(1, 1))


def test_the_device_is_a_node_of_sparkplug_until_the_file_says_no_more(home: Home) -> None:
    home.configure(broker="metrics_interval_s = 1", more='[sparkplug]\ngroup = "plant"')
    with Listener(port(home), "spBv1.0/#") as host, AgentProcess(home) as agent:
        wait_until(lambda: host.on(f"spBv1.0/plant/NBIRTH/{DEVICE}"))
        home.put("0", 0)
        home.outputs("0")

        def answered() -> bool:
            told = [decode(seen.payload) for seen in list(host.heard) if seen.kind in ("NBIRTH", "NDATA")]
            values = [metric.string_value for payload in told for metric in payload.metrics]
            return "tiny" in values

        wait_until(answered, what="the model's name")
        home.configure()
        agent.send(signal.SIGHUP)
        agent.wait_for("reloaded")
        wait_until(lambda: host.on(f"spBv1.0/plant/NDEATH/{DEVICE}"))
        births = len(host.on(f"spBv1.0/plant/NBIRTH/{DEVICE}"))
        agent.stop()
        assert len(host.on(f"spBv1.0/plant/NBIRTH/{DEVICE}")) == births
        assert violations(host.heard) == []


# The agent has its reporter only when that has already been asked what to take back.
EARLY = """
import sys, threading
from outrider.agent import daemon
from outrider.cli import main
made = daemon.open_reporter

def early(config, *, post, **options):
    asked = threading.Event()

    def posted(message):
        asked.set()
        return post(message)

    reporter = made(config, post=posted, **options)
    assert config.broker.home_assistant or asked.wait(100)
    return reporter

daemon.open_reporter = early
sys.exit(main())
"""


def test_home_assistant_forgets_the_device_though_the_connection_is_there_before_the_agent_knows_it(home: Home) -> None:
    config = f"homeassistant/device/outrider_{DEVICE}/config"
    with Listener(port(home), "homeassistant/#") as heard:
        home.configure(broker="home_assistant = true")
        with AgentProcess(home, program=("-c", EARLY)) as agent:
            wait_until(lambda: heard.on(config), what="found")
            home.configure()
            agent.send(signal.SIGHUP)
            agent.wait_for("reloaded")
            wait_until(lambda: heard.on(config)[-1].payload == b"", what="taken back by a reload")
            agent.stop()
        home.configure(broker="home_assistant = true")
        with AgentProcess(home) as agent:
            wait_until(lambda: heard.on(config)[-1].payload != b"", what="found again")
            agent.stop()
        home.configure()
        with AgentProcess(home, program=("-c", EARLY)) as agent:
            wait_until(lambda: heard.on(config)[-1].payload == b"", what="taken back after a restart")
            agent.stop()


def test_home_assistant_forgets_the_device_when_the_flag_goes_off_by_reload_or_restart(home: Home) -> None:
    config, vitals = f"homeassistant/device/outrider_{DEVICE}/config", f"outrider/v1/{DEVICE}/vitals"
    mark = home.state / "agent" / DEVICE / "home-assistant"

    def gone() -> bool:
        return bool(heard.on(config)) and heard.on(config)[-1].payload == b"" == heard.on(vitals)[-1].payload

    with Listener(port(home), "homeassistant/#", vitals) as heard:
        home.configure(broker="home_assistant = true")
        with AgentProcess(home) as agent:
            wait_until(lambda: heard.on(config) and heard.on(vitals), what="found")
            home.configure()
            agent.send(signal.SIGHUP)
            agent.wait_for("reloaded")
            wait_until(gone, what="taken back by a reload")
            wait_until(lambda: not mark.exists())
            agent.stop()
        home.configure(broker="home_assistant = true")
        with AgentProcess(home) as agent:
            wait_until(lambda: not gone(), what="found again")
            agent.stop()
        assert mark.stat().st_mode & 0o777 == 0o600
        home.configure()
        with AgentProcess(home) as agent:
            wait_until(gone, what="taken back after a restart")
            wait_until(lambda: not mark.exists())
            agent.stop()
        told = len(heard.on(config))
        with AgentProcess(home) as agent:
            assert command(home, "ping")["result"] == "ok"
            agent.stop()
        assert len(heard.on(config)) == told, "what was never asked for is not published"
