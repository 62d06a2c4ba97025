"""What a consumer reads of calls that failed: real engines, a real mosquitto, and programs that report no failure."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outrider
from outrider.telemetry import Record, Reporter, Sink
from outrider_runtimes.errors import DeadlineExceeded, DtypeError, InferenceError, NotFiniteError, ShapeError
from support import tinymodels
from support.agents import DEVICE, AgentProcess, board
from support.broker import Mosquitto, wait_until
from support.ports import free_port
from support.realbundles import images, make_real_bundle
from support.telemetry_schema import complaints

pytestmark = pytest.mark.slow

ABOVE = 1.5  # an input with a larger value is one that the engine fails at
ANGRY = images(1) + 2.0
GOOD = images(1)
FAR_MS = 60_000.0
BAD_INPUTS = [
    (ShapeError, np.zeros((1, 1, 3, 3), np.float32)),
    (DtypeError, GOOD.astype(np.float64)),
    (NotFiniteError, GOOD * np.float32(np.nan)),
]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


def load(tmp_path: Path, name: str, onnx: bytes, **options: Any) -> outrider.Model:
    make_real_bundle(tmp_path / f"{name}.outrider", name=name, files={"onnx": onnx})
    return outrider.load(tmp_path / f"{name}.outrider", state=tmp_path / "state", **options)


@pytest.fixture
def moody(tmp_path: Path) -> Iterator[outrider.Model]:
    """ONNX Runtime, which fails at ANGRY."""
    with load(tmp_path, "moody", tinymodels.moody_onnx(tinymodels.weights(0), "error", above=ABOVE)) as model:
        yield model


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[outrider.Model]:
    """ONNX Runtime in a process of its own, which never ends with ANGRY."""
    made = tinymodels.endless_onnx(tinymodels.weights(0), above=ABOVE)
    with load(tmp_path, "endless", made, isolation="process") as model:
        yield model


def reporter_of(url: str, tmp_path: Path) -> Reporter:
    """It sums up once, at its close."""
    return Reporter(url, device=DEVICE, state=tmp_path / "state", commit_interval_ms=20.0, metrics_interval_s=3600.0)


def child_of(model: outrider.Model) -> int | None:
    return model._session._session.pid  # type: ignore[union-attr]


def received(url: str, tmp_path: Path) -> tuple[dict[str, Any], Counter[tuple[str, str]]]:
    """After the close: the one metrics record, and how many events of failures there are, by name and error."""
    records: list[Record] = []
    with Sink(url, on_record=lambda _, record: records.append(record)), reporter_of(url, tmp_path) as again:
        assert again.flush(200.0, level="sink")
    (metrics,) = (record.body for record in records if record.kind == "metrics")
    assert complaints("metrics", metrics) == []
    events = [record.body for record in records if record.kind == "event"]
    failed = [event for event in events if event["name"].startswith("inference_")]
    return metrics, Counter((event["name"], event["fields"]["error"]) for event in failed)


def test_a_watched_models_calls_are_counted_once_each_whatever_becomes_of_them(
    broker: Mosquitto, tmp_path: Path, moody: outrider.Model, endless: outrider.Model
) -> None:
    with reporter_of(broker.url, tmp_path) as reporter:
        reporter.watch(moody)
        reporter.watch(endless)
        for deadline_ms in (None, FAR_MS):
            for _ in range(8):
                moody.infer(GOOD, deadline_ms=deadline_ms)
            with pytest.raises(InferenceError) as raised:
                moody.infer(ANGRY, deadline_ms=deadline_ms)
            assert reporter.failure(raised.value), "a program that says so too"
            for kind, inputs in BAD_INPUTS:
                with pytest.raises(kind):
                    moody.infer(inputs, deadline_ms=deadline_ms)
        first = child_of(endless)
        with pytest.raises(DeadlineExceeded):
            endless.infer(ANGRY, deadline_ms=50.0)
        assert reporter.failure(OSError("a camera that is gone")), "what never came to a model"
        wait_until(lambda: not endless.sick and child_of(endless) not in (None, first))
        endless.infer(GOOD, deadline_ms=FAR_MS)
    metrics, events = received(broker.url, tmp_path)
    assert metrics["predictions"] == metrics["latency_ms"]["count"] == 17
    assert metrics["failures"] == {"InferenceError": 2, "DeadlineExceeded": 1, "OSError": 1}
    assert metrics["refused"] == {"ShapeError": 2, "DtypeError": 2, "NotFiniteError": 2}
    assert metrics["availability"] == round(17 / 21, 6)
    assert events == {
        **{("inference_failed", error): count for error, count in metrics["failures"].items()},
        **{("inference_refused", error): count for error, count in metrics["refused"].items()},
    }


def test_a_watched_hybrids_calls_are_counted_once_each_with_a_cloud_that_is_gone(
    broker: Mosquitto, tmp_path: Path, moody: outrider.Model
) -> None:
    policy = outrider.Policy(FAR_MS, min_margin=0.0)
    with (
        outrider.Remote(f"http://127.0.0.1:{free_port()}", model="tiny") as cloud,
        outrider.Hybrid(moody, cloud, policy, state=tmp_path / "state") as hybrid,
        reporter_of(broker.url, tmp_path) as reporter,
    ):
        reporter.watch(moody)
        reporter.watch(hybrid)
        for _ in range(5):
            hybrid.infer(GOOD)
        with pytest.raises(InferenceError):
            hybrid.infer(ANGRY)
        with pytest.raises(ShapeError):
            hybrid.infer(BAD_INPUTS[0][1])
    metrics, _ = received(broker.url, tmp_path)
    assert (metrics["predictions"], metrics["failures"]) == (5, {"InferenceError": 1})
    assert (metrics["refused"], metrics["availability"]) == ({"ShapeError": 1}, round(5 / 6, 6))


def test_a_call_that_its_caller_breaks_off_is_in_no_count(
    broker: Mosquitto, tmp_path: Path, endless: outrider.Model
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with reporter_of(broker.url, tmp_path) as reporter:
            reporter.watch(endless)
            endless.infer(GOOD, deadline_ms=FAR_MS)
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                endless.infer(ANGRY, deadline_ms=2_000.0)
            endless.infer(GOOD, deadline_ms=FAR_MS)
    finally:
        signal.signal(signal.SIGALRM, before)
    metrics, events = received(broker.url, tmp_path)
    assert (metrics["predictions"], metrics["failures"], metrics["refused"]) == (2, {}, {})
    assert metrics["availability"] == 1.0 and not events


def test_two_reporters_count_for_themselves(broker: Mosquitto, tmp_path: Path, moody: outrider.Model) -> None:
    with (
        Reporter(broker.url, device="other", state=tmp_path / "state", metrics_interval_s=None) as other,
        reporter_of(broker.url, tmp_path) as reporter,
    ):
        reporter.watch(moody)
        with pytest.raises(InferenceError) as raised:
            moody.infer(ANGRY)
        assert reporter.failure(raised.value) and other.failure(raised.value)
        assert (reporter.account().offered, other.account().offered) == (1, 1)
        end = reporter.watch(moody)
        end()
    metrics, _ = received(broker.url, tmp_path)
    assert metrics["failures"] == {"InferenceError": 1}


def test_an_agents_frames_are_counted_once_each(tmp_path: Path) -> None:
    """The agent reports what could not be read; the model that it watches, what could not be answered."""
    with board(tmp_path) as home:
        home.configure(broker="metrics_interval_s = 3600")
        made = tinymodels.moody_onnx(tinymodels.weights(0), "error", above=ABOVE)
        make_real_bundle(home.folder / "tiny.outrider", files={"onnx": made})
        with AgentProcess(home) as agent:
            home.put("angry", 0, image=ANGRY[0])
            agent.wait_for("frame_failed")
            (home.inbox / "broken.npy").write_bytes(b"nothing")
            home.put("small", 0, image=BAD_INPUTS[0][1][0])
            agent.wait_for("frame_refused", 2)
            home.put("good", 1)
            home.outputs("good")
            outcome = agent.stop()
        metrics, events = received(home.broker_url, home.folder)
    assert (outcome["failed"], sum(outcome["refused"].values())) == ({"InferenceError": 1}, 2)
    assert (metrics["predictions"], metrics["failures"]) == (1, outcome["failed"])
    assert (metrics["refused"], metrics["availability"]) == (outcome["refused"], 0.5)
    assert sum(events.values()) == 3
