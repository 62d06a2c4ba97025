"""A Model in a process of its own: the same bits, and an end to calls that are stuck."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.installer import install
from outrider.model import Model, load
from outrider.store import Store
from outrider_runtimes import isolated
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.errors import (
    DeadlineExceeded,
    RunnerClosed,
)
from support import tinymodels
from support.realbundles import expected, images, make_real_bundle
from support.runners import until


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_bits_and_survives_a_stuck_call(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", files={"onnx": tinymodels.endless_onnx(tinymodels.weights(0), above=1.5)})
    with load(tmp_path / "b.outrider", state=tmp_path) as model:
        here = model.predict(images())["logits"]
    with load("tiny", state=tmp_path, isolation="process") as model:
        assert model.predict(images())["logits"].tobytes() == here.tobytes()
        first = child_of(model)
        with pytest.raises(DeadlineExceeded):
            model.infer(images() + 2.0, deadline_ms=50.0)
        until(lambda: not model.sick and child_of(model) not in (None, first))
        assert model.infer(images(), deadline_ms=60_000.0).outputs["logits"].tobytes() == here.tobytes()
        assert not model.sick


def child_of(model: Model) -> int | None:
    return model._session._session.pid  # type: ignore[union-attr]


def frozen_model(tmp_path: Path) -> tuple[Model, int]:
    """A model in a child that is stopped, and the child's process id."""
    make_real_bundle(tmp_path / "b.outrider")
    model = load(tmp_path / "b.outrider", state=tmp_path, isolation="process")
    model.infer(images())
    child = child_of(model)
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    return model, child


@pytest.mark.slow
@pytest.mark.parametrize("worker", [False, True])
def test_close_ends_a_frozen_child_whose_call_has_no_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: bool
) -> None:
    monkeypatch.setattr("outrider.model.CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr("outrider_runtimes.worker.CLOSE_TIMEOUT_S", 0.05)
    model, child = frozen_model(tmp_path)
    if worker:
        model._start_worker()
    assert isinstance(model._session, BoundSession)
    assert isinstance(closed_in_a_call(model, model._session), RunnerClosed)
    assert not Path(f"/proc/{child}").exists()


def closed_in_a_call(model: Model, session: BoundSession) -> BaseException:
    """Close a model while a call without a deadline is inside its session; what that call ended with."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            model.infer(images())
        except BaseException as error:
            failures.append(error)

    caller, closer = (threading.Thread(target=target, daemon=True) for target in (call, model.close))
    caller.start()
    while not session._lock.locked():
        assert caller.is_alive()
    closer.start()
    closer.join(60.0)
    caller.join(60.0)
    assert not closer.is_alive() and not caller.is_alive()
    return failures[0]


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A state where version 2 is on trial over version 1."""
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
        install(tmp_path / f"{version}.outrider", state=tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_fresh_bundle_whose_call_is_ended_for_a_close_is_not_taken_back(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider.model.CLOSE_TIMEOUT_S", 0.05)
    model = load("tiny", state=fresh, isolation="process")
    session = model._session._opened.session  # type: ignore[union-attr]
    os.kill(session._session.pid, signal.SIGSTOP)
    assert isinstance(closed_in_a_call(model, session), RunnerClosed)
    assert Store(fresh).installed("tiny").manifest.version == 2


@pytest.mark.slow
def test_a_fresh_bundle_that_is_stuck_on_its_golden_inputs_at_load_is_taken_back(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider.admit.supervise.Limits.wall_s", 0.2)
    ask, frozen = isolated._Child.ask, []

    def freeze_first(child: Any, *arguments: Any) -> Any:
        if not frozen:
            frozen.append(child.pid)
            os.kill(child.pid, signal.SIGSTOP)
        return ask(child, *arguments)

    monkeypatch.setattr(isolated._Child, "ask", freeze_first)
    with load("tiny", state=fresh, isolation="process") as model:
        assert (model.bundle.version, [change.kind for change in model.changes]) == (1, ["rollback"])
        assert "the call was stuck" in model.changes[0].reason
        assert np.allclose(model.predict(images())["logits"], expected(images(), 1), atol=1e-3)
    assert not Path(f"/proc/{frozen[0]}").exists()
