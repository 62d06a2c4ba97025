"""A recovery that is cut short loses nothing, and a forked child writes nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from outrider.telemetry import spool as spool_module
from outrider.telemetry.spool import Spool
from outrider_runtimes.errors import TelemetryError
from support.telemetry import a_draft


class Killed(BaseException):
    """Nothing that the recovery does after it would be done."""


@pytest.mark.parametrize("step", ["salvage", "fresh", "put_in_place", "keep"])
def test_a_recovery_that_ends_at_any_step_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.sqlite"
    with Spool(path) as spool:
        spool.append([a_draft(number) for number in range(100)])
        bodies = [row.body for row in spool.peek(1000)]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE account SET enqueued=enqueued+1, pending=pending+1")

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(spool_module, step, killed)
        Spool(path)
    with Spool(path) as spool:
        assert (spool.recovered, spool.salvaged) == ("a recovery was cut short", 100)
        assert [row.body for row in spool.peek(1000)] == bodies
    assert not [file.name for file in tmp_path.iterdir() if "damaged" in file.name or "fresh" in file.name]


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    with Spool(tmp_path / "x.sqlite") as spool:
        spool.append([a_draft()] * 10)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(TelemetryError):
                spool.append([a_draft()])
                code = 2
            spool.close()
            os._exit(0 if code == 1 else code)
        assert os.waitpid(child, 0)[1] == 0
        with contextlib.closing(sqlite3.connect(spool.path)) as db:
            assert db.execute("SELECT clean, pending FROM account").fetchone() == (0, 10)
        with pytest.raises(TelemetryError, match="in use"):
            Spool(spool.path)
