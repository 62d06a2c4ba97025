"""A reporter that Home Assistant finds, at a real mosquitto: found, told, told again, away, and removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.telemetry import Reporter
from outrider.telemetry.homeassistant import discovery_topic, remove, vitals_topic
from outrider.telemetry.record import topics
from outrider.telemetry.vitals import Vitals
from outrider_runtimes.errors import ConfigError, TelemetryError
from support.broker import Mosquitto, wait_until
from support.listener import Listener
from support.telemetry import Source

pytestmark = pytest.mark.slow

CONFIG, VITALS = discovery_topic("pi-07"), vitals_topic("pi-07")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


def a_reporter(broker: Mosquitto, state: Path, **options: Any) -> Reporter:
    options = {"home_assistant": True, "commit_interval_ms": 20.0, "metrics_interval_s": 0.2, **options}
    return Reporter(broker.url, device="pi-07", state=state, **options)


def test_it_is_found_told_and_away(broker: Mosquitto, tmp_path: Path) -> None:
    source = Source()
    with Listener(broker.port, CONFIG, VITALS) as home:
        with a_reporter(broker, tmp_path) as reporter:
            reporter.watch(source)
            wait_until(lambda: home.on(CONFIG) and home.on(VITALS), what="found")
            source.predict(40, start=1)
            # An interval may end among them.
            wait_until(
                lambda: sum(json.loads(seen.payload)["predictions"] for seen in home.on(VITALS)) == 40, what="told"
            )
        config = json.loads(home.on(CONFIG)[0].payload)
    # Who comes later finds what the broker kept, and that the device is not there.
    status, config_topic = config["availability"][0]["topic"], CONFIG
    with Listener(broker.port, status, config_topic, config["state_topic"]) as later:
        wait_until(lambda: len({seen.topic for seen in list(later.heard)}) == 3, what="what was kept")
        assert all(seen.retain for seen in later.heard)
        assert json.loads(later.on(topics("pi-07").status)[0].payload)["state"] == "offline"


def test_it_is_told_again_when_home_assistant_starts(broker: Mosquitto, tmp_path: Path) -> None:
    with Listener(broker.port, CONFIG) as home, a_reporter(broker, tmp_path, metrics_interval_s=None):
        wait_until(lambda: len(home.on(CONFIG)) == 1, what="found")
        home.say("homeassistant/status", b"offline")
        home.say("homeassistant/status", b"online")
        wait_until(lambda: len(home.on(CONFIG)) == 2, what="told again")
        broker.stop()
        broker.start()
    with Listener(broker.port, CONFIG) as home:
        wait_until(lambda: home.on(CONFIG), what="kept by the broker")


def test_another_prefix_and_none(broker: Mosquitto, tmp_path: Path) -> None:
    other = discovery_topic("pi-07", prefix="ha2")
    with Listener(broker.port, "homeassistant/#", "ha2/#", VITALS) as home:
        with a_reporter(broker, tmp_path, home_assistant=False, metrics_interval_s=0.1) as reporter:
            wait_until(lambda: reporter.connected, what="connected")
            assert reporter.flush(200.0)
        with a_reporter(broker, tmp_path, home_assistant="ha2"):
            wait_until(lambda: home.on(other) and home.on(VITALS), what="found")
        assert {seen.topic for seen in home.heard} == {other, VITALS}


def test_it_is_removed_and_stays_so(broker: Mosquitto, tmp_path: Path) -> None:
    with Listener(broker.port, CONFIG, VITALS) as home:
        with a_reporter(broker, tmp_path, metrics_interval_s=None):
            wait_until(lambda: home.on(CONFIG) and home.on(VITALS), what="found")
        remove(broker.url, device="pi-07", timeout_s=120.0)
        wait_until(lambda: home.on(CONFIG)[-1].payload == home.on(VITALS)[-1].payload == b"", what="removed")
        home.say("after", b"")
    with Listener(broker.port, "#") as later, Listener(broker.port, "nothing") as marker:
        marker.say("marker", b"x")
        wait_until(lambda: later.on("marker"), what="all that was kept has come")
        assert {seen.topic for seen in later.heard if seen.retain} & {CONFIG, VITALS} == set()


class Serving(Source):
    """A source that says which bundle it serves, as a Model does."""

    def __init__(self, version: int) -> None:
        super().__init__()
        digest = "ab" * 32
        self.bundle = SimpleNamespace(name="digits", version=version, digest=digest, verified=True)
        self.interface = SimpleNamespace(digest=digest)
        self.variant, self.engine = "onnx-int8", "onnxruntime"


def test_vitals_are_told_at_once_with_each_metrics_record_and_when_another_model_serves(tmp_path: Path) -> None:
    told: list[Vitals] = []
    hurt: list[Vitals] = []

    def fails(vitals: Vitals) -> None:
        hurt.append(vitals)
        raise RuntimeError("a callback that fails")

    source = Serving(version=4)
    options: dict[str, Any] = {"commit_interval_ms": 20.0, "metrics_interval_s": 0.1}
    with Reporter("mqtt://127.0.0.1:1", device="pi-07", state=tmp_path, **options) as reporter:
        reporter.on_vitals(fails)
        end = reporter.on_vitals(told.append)
        assert told[0] == Vitals()
        reporter.watch(source)
        assert (told[-1].model, told[-1].version, told[-1].variant) == ("digits", 4, "onnx-int8")
        source.predict(40, start=1)
        wait_until(lambda: sum(vitals.predictions for vitals in list(told)) >= 40, what="counted")
        assert told[-1].model == "digits" and told[-1].memory_rss_bytes
        end()
        ended = len(hurt)
        wait_until(lambda: len(hurt) > ended, what="what was being told at that moment has been")
        count, after = len(told), len(hurt)
        wait_until(lambda: len(hurt) > after + 1, what="the other callback goes on, failing or not")
        assert len(told) == count


def test_a_removal_that_cannot_be_confirmed_says_so() -> None:
    with pytest.raises(TelemetryError, match="did not confirm that pi-07 was removed") as raised:
        remove("mqtt://127.0.0.1:1", device="pi-07", timeout_s=0.2)
    assert "broker" in raised.value.hint
    with pytest.raises(ConfigError, match="prefix"):
        remove("mqtt://127.0.0.1:1", device="pi-07", prefix="#")
