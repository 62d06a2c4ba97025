"""What a reporter does on a disk that is full at its start, with a broker that refuses, and when a callback fails."""

from __future__ import annotations

import logging
import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry import Limits, Reporter, Sink
from outrider_runtimes.errors import ConfigError, TelemetryError
from outrider_runtimes.heat import Heat
from outrider_runtimes.runner import Timing
from support.broker import Mosquitto, wait_until
from support.telemetry import Source, a_prediction
from support.tmpfs import fill, small_disk

pytestmark = pytest.mark.slow

NOWHERE = "mqtt://127.0.0.1:1"


def open_reporter(url: str, state: Path, **changes: Any) -> Reporter:
    options: dict[str, Any] = {
        "device": "pi-07",
        "state": state,
        "commit_interval_ms": 20.0,
        "metrics_interval_s": None,
        "rng": random.Random(1),
    }
    return Reporter(url, **(options | changes))


@pytest.mark.parametrize("lived_before", [True, False])
def test_on_a_disk_that_is_full_at_the_start_it_waits_for_room_in_memory(tmp_path: Path, lived_before: bool) -> None:
    source, offered = Source(), 8 if lived_before else 5
    with Mosquitto(tmp_path / "m") as broker, small_disk(tmp_path / "disk", size_kib=2048) as disk:
        if lived_before:
            with open_reporter(NOWHERE, disk) as first:
                first.watch(source)
                source.predict(3)
        ballast = fill(disk)
        with Sink(broker.url) as sink, open_reporter(broker.url, disk, queue_size=5) as reporter:
            wait_until(lambda: sink.connected)
            assert "full" in reporter.spool_error or "space" in reporter.spool_error
            reporter.watch(source)
            source.predict(7)
            assert not reporter.flush(0.1)
            account = reporter.account()
            assert (account.offered, account.lost, account.enqueued) == (7, 2, 0)
            assert not reporter.event("no room")
            with pytest.raises(TelemetryError, match="pi-07 is not open"):
                _ = reporter.spool
            ballast.unlink()
            assert reporter.flush(200.0, level="sink")
            assert reporter.spool_error == ""
            assert (reporter.account().delivered, reporter.account().lost) == (offered, 3)


def test_on_a_disk_that_stays_full_it_closes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", size_kib=2048) as disk:
        fill(disk)
        with open_reporter(NOWHERE, disk) as reporter:
            assert reporter.event("x")
        assert "1 records could not be committed" in caplog.text


def test_a_brokers_packet_limit_is_kept_and_breaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    source = Source()
    with Mosquitto(tmp_path / "m", extra="max_packet_size 5000\n") as broker, Sink(broker.url) as sink:
        wait_until(lambda: sink.connected)
        with open_reporter(broker.url, tmp_path / "state") as reporter:
            reporter.watch(source)
            source.predict(500)
            assert reporter.flush(200.0, level="sink")
        assert "next attempt" not in caplog.text


def test_what_a_broker_refuses_is_not_confirmed_and_said(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    allowed = "topic read #\ntopic write outrider/v1/+/status\ntopic write outrider/v1/+/info\n"
    rules.write_text(allowed)
    quick = Limits(receipt_timeout_s=0.1)
    extra = f"acl_file {rules}\n"
    with (
        Mosquitto(tmp_path / "m", extra=extra) as broker,
        open_reporter(broker.url, tmp_path / "state", limits=quick) as reporter,
    ):
        reporter.event("x")
        wait_until(lambda: reporter.held_back)
        assert "Not authorized" in reporter.held_back
        assert not reporter.flush(0.3, level="broker")
        rules.write_text(allowed + "topic write outrider/v1/+/records\n")
        broker.restart()
        assert reporter.flush(200.0, level="broker"), "and is sent again"
        assert reporter.held_back == ""


def test_what_fails_in_the_writer_is_said_and_ends_nothing(tmp_path: Path) -> None:
    broken = threading.Event()
    broken.set()

    def heat() -> Heat:
        if broken.is_set():
            raise ZeroDivisionError("a sensor")
        return Heat()

    with open_reporter(NOWHERE, tmp_path, heat=heat, metrics_interval_s=1e-3) as reporter:
        wait_until(lambda: "a sensor" in reporter.spool_error)
        broken.clear()
        reporter.event("x")
        assert reporter.flush(200.0)
        assert reporter.spool_error == ""


def test_a_prediction_that_makes_no_record_is_lost_and_counted(tmp_path: Path) -> None:
    source = Source()
    with open_reporter(NOWHERE, tmp_path) as reporter:
        reporter.watch(source)
        source.callbacks[0](a_prediction()._replace(timing_ms=None))  # type: ignore[arg-type]
        source.predict(2)
        assert reporter.flush(200.0)
        assert (reporter.account().lost, reporter.account().enqueued) == (1, 2)


def test_a_flood_of_what_makes_no_record_does_not_flood_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source()
    with open_reporter(NOWHERE, tmp_path, metrics_interval_s=None) as reporter:
        reporter.watch(source)
        foreseen = a_prediction()._replace(reason="x" * 100_000)
        unforeseen = a_prediction()._replace(timing_ms=None)  # type: ignore[arg-type]
        for odd in [foreseen] * 3 + [unforeseen] * 6:
            source.callbacks[0](odd)
        assert reporter.flush(200.0)
        assert reporter.account().lost == 9
    said = [record for record in caplog.records if "cannot be made" in record.message]
    assert [record.args[0] for record in said if isinstance(record.args, tuple)] == [1, 2, 4, 8]
    assert [record.exc_info is not None for record in said] == [False, False, True, True]


def test_a_wait_that_is_no_number_does_not_end_the_metrics(tmp_path: Path) -> None:
    source = Source()
    with open_reporter(NOWHERE, tmp_path, metrics_interval_s=1e-3) as reporter:
        reporter.watch(source)
        source.callbacks[0](a_prediction()._replace(timing_ms=Timing(total=math.nan), reason="x" * 100_000))
        source.predict(2)
        assert reporter.flush(200.0)
        assert (reporter.spool_error, reporter.account().lost) == ("", 1)


def test_it_may_be_closed_by_its_own_callback(tmp_path: Path) -> None:
    called = []

    def close(vitals: object) -> None:
        called.append(vitals)
        if len(called) > 1:  # the first comes at once, on this thread
            reporter.close()

    reporter = open_reporter(NOWHERE, tmp_path, metrics_interval_s=1e-3)
    reporter.on_vitals(close)
    wait_until(lambda: reporter.closed)

    def is_free() -> bool:
        try:
            open_reporter(NOWHERE, tmp_path).close()
        except TelemetryError:
            return False
        return True

    wait_until(is_free, what="the spool is let go of")


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *(("max_age_s", value) for value in (float("inf"), "5", True)),
        *(("queue_size", value) for value in (0.5, float("inf"), "5", True)),
        *(("max_bytes", value) for value in (0.5, float("inf"), True)),
        *(("sample", value) for value in ("a", True, float("nan"))),
        *(("commit_interval_ms", value) for value in ("5", float("nan"), True)),
        *(("limits", 5), ("inputs", 5), ("rng", 5), ("state", 5), ("metrics_interval_s", "5")),
        *(("credentials", value) for value in (("u", 5), ("u" * 70_000, "p"), ("u\0", "p"), ("u", "\ud800"))),
    ],
)
def test_an_option_that_is_none_is_named(tmp_path: Path, option: str, wrong: object) -> None:
    with pytest.raises(ConfigError, match=option):
        open_reporter(NOWHERE, **({"state": tmp_path} | {option: wrong}))


@pytest.mark.parametrize("wrong", ["x", None, float("nan"), True])
def test_a_time_to_flush_is_a_number(tmp_path: Path, wrong: Any) -> None:
    with open_reporter(NOWHERE, tmp_path) as reporter, pytest.raises(ConfigError, match="timeout_s"):
        reporter.flush(wrong)
