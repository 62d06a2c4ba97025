"""A spool that a kill left: the reporter's first calls do not wait until it is examined, and nothing of it is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from outrider.telemetry import Reporter
from outrider.telemetry.spool import Spool
from outrider_runtimes.errors import TelemetryError
from support.broker import wait_until
from support.telemetry import Source, a_draft

pytestmark = pytest.mark.slow

PENDING = 200


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with the spool of pi-07 as it is on the disk while it is open."""
    with Spool(tmp_path / "live.sqlite") as spool:
        spool.append([a_draft(number) for number in range(PENDING)])
        (tmp_path / "telemetry").mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{spool.path}{suffix}", f"{path_of(tmp_path)}{suffix}")
    return tmp_path


def path_of(state: Path) -> Path:
    return state / "telemetry" / "pi-07.sqlite"


def open_reporter(state: Path) -> Reporter:
    return Reporter(
        "mqtt://127.0.0.1:1",
        device="pi-07",
        state=state,
        commit_interval_ms=20.0,
        metrics_interval_s=None,
        rng=random.Random(1),
    )


def test_who_asks_for_it_waits_and_finds_all(state: Path) -> None:
    source = Source()
    with open_reporter(state) as reporter:
        assert reporter.account().pending == PENDING
        reporter.watch(source)
        source.predict(3)
        assert reporter.flush(200.0)
        assert reporter.account().pending == PENDING + 3
        assert reporter.spool.last_seq == PENDING + 1 + 3, "one number is burned: something may have been lost"
    with Spool(path_of(state)) as spool:
        assert spool.account().pending == PENDING + 3


def test_a_reporter_that_is_closed_at_once_leaves_it_whole(state: Path) -> None:
    with open_reporter(state):
        pass
    assert not Path(f"{path_of(state)}-wal").exists()
    with Spool(path_of(state)) as spool:
        assert (spool.account().pending, spool.last_seq) == (PENDING, PENDING + 1)


def test_what_is_wrong_in_it_is_found_on_the_writers_thread(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path(f"{path_of(state)}-wal").write_bytes(b"garbage" * 1000)
    with open_reporter(state) as reporter:
        assert reporter.spool.recovered
        assert reporter.flush(200.0) and reporter.spool_error == ""
    (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert said.threadName == "outrider-spool-pi-07"


def test_one_of_a_newer_version_is_said_and_what_is_offered_waits(state: Path) -> None:
    with contextlib.closing(sqlite3.connect(path_of(state))) as db:
        db.execute("PRAGMA user_version=99")
        db.commit()
        Path(f"{path_of(state)}.damaged").touch()  # as a recovery that was cut short leaves it, journal or none
        source = Source()
        with open_reporter(state) as reporter:
            reporter.watch(source)
            source.predict(2)
            wait_until(lambda: reporter.spool_error)
            assert "newer version" in reporter.spool_error
            assert (reporter.account().offered, reporter.account().enqueued) == (2, 0)
            with pytest.raises(TelemetryError, match="newer version"):
                _ = reporter.spool


def test_who_has_it_is_said_at_once(state: Path) -> None:
    with Spool(path_of(state)) as spool:
        assert Path(f"{spool.path}-wal").exists()
        with pytest.raises(TelemetryError, match=f"in use by process {os.getpid()}"):
            open_reporter(state)
        assert spool.append([a_draft()])
    with open_reporter(state) as reporter:
        assert reporter.account().pending == PENDING + 1
