"""Fixtures of more than one file. Boards run some of those files: what a board lacks is imported in the fixture."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.model import Model, load
from outrider_runtimes.worker import Worker
from support.clocks import ManualClock
from support.doubling import Gate, GatedSession, bound
from support.runners import NumpyRunner

HERE = Path(__file__).parent
UNCAUGHT = "error::pytest.PytestUnhandledThreadExceptionWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An exception that ends a thread fails the test: an assertion there would say nothing otherwise."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.filterwarnings(UNCAUGHT))


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an agent makes of its process's logging when it begins ends with the test."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("", "outrider", "outrider_runtimes")}
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def edge() -> Iterator[NumpyRunner]:
    """The side whose answers are the inputs."""
    runner = NumpyRunner()
    yield runner
    runner.close()


@pytest.fixture
def cloud() -> Iterator[NumpyRunner]:
    """The side whose answers are twice the inputs."""
    runner = NumpyRunner(gain=2.0)
    yield runner
    runner.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.go.set()


@pytest.fixture
def gated() -> GatedSession:
    return GatedSession()


@pytest.fixture
def make_worker(gated: GatedSession, clock: ManualClock) -> Iterator[Callable[..., Worker]]:
    """Workers over ``gated`` on ``clock``, which are closed at the end."""
    workers: list[Worker] = []

    def build(**options: Any) -> Worker:
        workers.append(Worker(bound(gated), clock=clock, **options))
        return workers[-1]

    yield build
    gated.let.release(1000)
    for worker in workers:
        worker.close()


@pytest.fixture(scope="session")
def tiny_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory in which "tiny" with both formats is installed; tests only read it."""
    from outrider.installer import install
    from support.realbundles import make_real_bundle

    folder = tmp_path_factory.mktemp("tiny")
    make_real_bundle(folder / "tiny.outrider", formats=("onnx", "tflite"))
    install(folder / "tiny.outrider", state=folder / "state")
    return folder / "state"


@pytest.fixture
def model(tiny_state: Path) -> Iterator[Model]:
    """The installed "tiny", loaded."""
    with load("tiny", state=tiny_state) as model:
        yield model
