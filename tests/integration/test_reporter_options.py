"""How a reporter is opened and closed: options that are refused, one for each device, and a child that was forked."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry import Sink
from outrider_runtimes.errors import ConfigError, StateDirectoryError, TelemetryError
from support.broker import Mosquitto, wait_until
from support.forks import in_child
from support.telemetry import Source
from support.telemetry_trials import open_reporter


@pytest.fixture
def source() -> Source:
    return Source()


def test_a_callback_is_no_longer_called_after_unwatch_and_close(tmp_path: Path, source: Source) -> None:
    with open_reporter("mqtt://127.0.0.1:1", tmp_path) as reporter:
        unwatch = reporter.watch(source)
        source.predict(1)
        unwatch()
        unwatch()
        source.predict(1)
        reporter.watch(source)
        assert reporter.account().offered == 1
    source.predict(1)
    reporter.close()
    for use in (lambda: reporter.event("late"), reporter.flush):
        with pytest.raises(TelemetryError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "a/b"}, "device id"),
        ({"commit_interval_ms": 0}, "commit_interval_ms"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"queue_size": 0}, "queue_size"),
        ({"credentials": "secret"}, "credentials"),
        ({"tls": "/nowhere/ca.pem"}, "certificates are given"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_left_open(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        open_reporter("mqtt://127.0.0.1:1", tmp_path, **changes)
    open_reporter("mqtt://127.0.0.1:1", tmp_path).close()


def test_a_second_reporter_of_the_same_device_is_refused(tmp_path: Path) -> None:
    with open_reporter("mqtt://127.0.0.1:1", tmp_path):
        with pytest.raises(TelemetryError, match=f"in use by process {os.getpid()}"):
            open_reporter("mqtt://127.0.0.1:1", tmp_path)
        open_reporter("mqtt://127.0.0.1:1", tmp_path, device="pi-08").close()


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirectoryError, match=str(tmp_path / "file")):
        open_reporter("mqtt://127.0.0.1:1", tmp_path, state=tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, "x" * 100_000])
def test_an_event_that_cannot_be_reported_is_refused_at_once(tmp_path: Path, value: object) -> None:
    with open_reporter("mqtt://127.0.0.1:1", tmp_path) as reporter:
        with pytest.raises(TelemetryError, match="event record"):
            reporter.event("odd", value=value)
        assert reporter.account().offered == 0


def test_after_close_nothing_more_is_watched(tmp_path: Path, source: Source) -> None:
    reporter = open_reporter("mqtt://127.0.0.1:1", tmp_path)
    reporter.close()
    with pytest.raises(TelemetryError, match="closed"):
        reporter.watch(source)


def test_flush_may_wait_for_ever(tmp_path: Path, source: Source) -> None:
    with open_reporter("mqtt://127.0.0.1:1", tmp_path) as reporter:
        reporter.watch(source)
        source.predict(3)
        assert reporter.flush(float("inf"))
        assert reporter.account().pending == 3


@pytest.mark.parametrize("interval_ms", [float("inf"), 1e300])
def test_an_interval_that_never_ends_is_refused(tmp_path: Path, interval_ms: float) -> None:
    with pytest.raises(ConfigError, match="commit_interval_ms"):
        open_reporter("mqtt://127.0.0.1:1", tmp_path, commit_interval_ms=interval_ms)


def test_a_forked_child_closes_it_and_harms_nothing_of_the_parents(tmp_path: Path, source: Source) -> None:
    with (
        Mosquitto(tmp_path / "mosquitto") as broker,
        Sink(broker.url) as sink,
        open_reporter(broker.url, tmp_path, commit_interval_ms=1.0) as reporter,
    ):
        wait_until(lambda: sink.connected)
        reporter.watch(source)
        for _ in range(10):  # its threads are in the middle of something
            source.predict(100)
            assert in_child(reporter.close) == "None"
        assert "closed" in in_child(lambda: (reporter.close(), reporter.event("late")))
        with contextlib.closing(sqlite3.connect(reporter.spool.path)) as db:
            assert db.execute("SELECT clean FROM account").fetchone() == (0,)
        assert reporter.flush(200.0, level="sink")
        account = reporter.account()
        assert (account.delivered, account.pending, account.dropped) == (1000, 0, 0)
        assert (sink.count().received, sink.count().gaps) == (1000, 0)
