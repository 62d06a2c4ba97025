"""The loop over a real model: what goes wrong with one input, or with the source, ends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.agent.answering import Answering, open_cloud
from outrider.agent.config import CloudConfig
from outrider.agent.loop import Loop
from outrider.agent.payload import Named, Payload
from outrider.agent.sourceconfig import StdinConfig
from outrider.agent.sources.base import Frame
from outrider.policy import Policy
from outrider_runtimes.errors import ConfigError, InputError, OutriderError, RolledBack, SourceError
from support import tinymodels
from support.hybrids import onnx_model
from support.realbundles import expected, images


class Script:
    """A source that gives what is written down, once each time it is opened; an exception is raised."""

    def __init__(self, *openings: list[Any]) -> None:
        self.openings = list(openings)
        self.closed = 0
        self.done: list[str] = []

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        try:
            for item in self.openings.pop(0) if self.openings else []:
                if isinstance(item, Exception):
                    raise item
                if callable(item):
                    item()
                    yield None
                else:
                    yield item
        finally:
            self.closed += 1

    def frame(self, name: str, value: Payload | Exception) -> Frame:
        def read() -> Payload:
            if isinstance(value, Exception):
                raise value
            return value

        return Frame(name=name, read=read, done=lambda: self.done.append(name))


class Running:
    """A loop and what it told."""

    def __init__(self, answering: Answering, source: Script, **changes: Any) -> None:
        self.told: list[str] = []
        self.failures: list[str] = []
        self.answers: list[np.ndarray] = []
        self.inputs: list[tuple[np.ndarray, np.ndarray]] = []
        self.rolled_back = 0
        self.now = 0.0

        def sleep(seconds: float) -> None:
            self.now += seconds
            if self.resume_at is not None and self.now >= self.resume_at:
                self.loop.paused = False

        self.resume_at: float | None = None

        def beat() -> None:
            if changes.get("stop_after") is not None and len(self.told) >= changes["stop_after"]:
                self.loop.stopped = "enough"

        answering.face.on_prediction(lambda prediction: self.answers.append(prediction.outputs["logits"]))
        self.loop = Loop(
            answering,
            source,
            StdinConfig(),
            writer=None,
            tell=lambda name, **_: self.told.append(name),
            failure=lambda error: self.failures.append(type(error).__name__),
            answered=lambda inputs, prediction: self.inputs.append((inputs["image"], prediction.outputs["logits"])),
            beat=beat,
            rolled_back=self._count,
            paused=changes.get("paused", False),
            clock=lambda: self.now,
            sleep=sleep,
        )

    def _count(self) -> None:
        self.rolled_back += 1


def image(seed: int) -> Named:
    return Named(arrays={"image": images(1, seed)})


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    with onnx_model(tmp_path) as model:
        yield Answering(model, None, None, deadline_ms=None, state=tmp_path)


def test_each_input_is_answered_and_what_cannot_be_is_counted(answering: Answering) -> None:
    source = Script()
    frames = [
        source.frame("0", image(0)),
        None,
        source.frame("unreadable", InputError("cut")),
        source.frame("wrong shape", Named(arrays={"image": np.zeros((1, 2), np.float32)})),
        source.frame("a fault", ZeroDivisionError("ours")),
        source.frame("1", image(1)),
    ]
    source.openings.append(frames)
    running = Running(answering, source)
    assert running.loop.run() == "source ended"
    for seed, logits in enumerate(running.answers):
        np.testing.assert_allclose(logits, expected(images(1, seed)), atol=1e-4)
    assert running.loop.counts.to_dict() == {
        "frames": 5,
        "answered": 2,
        "refused": {"InputError": 1, "ShapeError": 1},
        "failed": {"ZeroDivisionError": 1},
    }
    assert running.failures == ["InputError", "ShapeError", "ZeroDivisionError"]
    assert source.done == ["0", "unreadable", "wrong shape", "a fault", "1"]
    assert source.closed == 1


def test_an_engine_that_fails_on_one_input_answers_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moody = tinymodels.moody_onnx(tinymodels.weights(0), "error", above=5.0)
    monkeypatch.setattr(tinymodels, "classifier_onnx", lambda weights: moody)
    source = Script()
    angry = Named(arrays={"image": np.full((1, 1, 8, 8), 6.0, np.float32)})
    source.openings.append([source.frame("angry", angry), source.frame("1", image(1))])
    with onnx_model(tmp_path) as model:
        running = Running(Answering(model, None, None, deadline_ms=None, state=tmp_path), source)
        running.loop.run()
    assert running.loop.counts.to_dict()["failed"] == {"InferenceError": 1}
    assert running.loop.counts.answered == 1


def test_a_source_that_dies_is_opened_again_and_said(answering: Answering) -> None:
    source = Script()
    died = SourceError("unplugged", hint="plug it in")
    source.openings += [
        [source.frame("0", image(0)), died],
        [died],
        [ZeroDivisionError("ours")],
        [source.frame("1", image(1))],
    ]
    running = Running(answering, source)
    assert running.loop.run() == "source ended"
    assert running.loop.counts.answered == 2
    assert running.told == ["source_failed", "source_back"]
    assert source.closed == 4
    assert running.now == 1.0 + 2.0 + 4.0, "seconds to the second, third and fourth opening"


def test_the_wait_for_a_source_has_an_end_and_begins_anew_once_it_gave_something(answering: Answering) -> None:
    source = Script()
    died = SourceError("unplugged", hint="plug it in")
    source.openings += [[died]] * 8
    source.openings += [[source.frame("0", image(0)), died], [source.frame("1", image(1))]]
    running = Running(answering, source)
    assert running.loop.run() == "source ended"
    assert running.now == 1 + 2 + 4 + 8 + 16 + 32 + 60 + 60 + 1


def test_a_stop_is_obeyed_while_nothing_comes_and_while_the_source_is_dead(answering: Answering) -> None:
    def stop() -> None:
        quiet.loop.stopped = "SIGTERM"

    source = Script([None, stop, SourceError("never asked")])
    quiet = Running(answering, source)
    assert quiet.loop.run() == "SIGTERM"
    assert source.closed == 1
    dead = Running(answering, Script(*[[SourceError("gone")]] * 100), stop_after=1)
    assert dead.loop.run() == "enough"


def test_a_pause_closes_the_source_and_a_resume_opens_it(answering: Answering) -> None:
    source = Script()

    def pause() -> None:
        running.loop.paused = True
        running.resume_at = running.now + 3600.0

    source.openings += [
        [source.frame("0", image(0)), pause, source.frame("lost", image(1))],
        [source.frame("2", image(2))],
    ]
    running = Running(answering, source)
    assert running.loop.run() == "source ended"
    assert source.done == ["0", "2"]
    assert source.closed == 2


def test_another_source_is_read_from_the_next_turn_on(answering: Answering) -> None:
    other = Script()
    other.openings.append([other.frame("other", image(0))])
    source = Script([lambda: running.loop.read_from(other, StdinConfig()), SourceError("never asked")])
    running = Running(answering, source)
    assert running.loop.run() == "source ended"
    assert (source.closed, other.done) == (1, ["other"])


def test_a_model_that_went_back_is_asked_for_again(answering: Answering) -> None:
    source = Script()
    source.openings.append([source.frame("x", RolledBack("another interface"))])
    running = Running(answering, source)
    running.loop.run()
    assert running.rolled_back == 1
    assert running.loop.counts.to_dict()["failed"] == {"RolledBack": 1}


# what answers


def test_parts_are_replaced_and_what_is_not_used_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = onnx_model(tmp_path / "a"), onnx_model(tmp_path / "b", seed=1)
    cloud = open_cloud(CloudConfig(url="http://127.0.0.1:9", model="large"))
    policy = Policy(deadline_ms=60_000.0, min_margin=0.99, offload_when_queued=False)
    answering = Answering(one, None, None, deadline_ms=None, state=tmp_path)
    assert answering.face is one
    answering.change(cloud=cloud, policy=policy, deadline_ms=None)
    prediction = answering.infer({"image": images(1, 3)})
    assert prediction.source == "edge_degraded"
    answering.change(model=two, cloud=cloud, policy=policy, deadline_ms=None)
    np.testing.assert_allclose(
        answering.infer({"image": images(1, 3)}).outputs["logits"], expected(images(1, 3), 1), atol=1e-4
    )
    with pytest.raises(OutriderError):
        one.infer({"image": images(1, 3)})
    with pytest.raises(ConfigError, match=r"policy\.output"):
        answering.change(cloud=cloud, policy=Policy(deadline_ms=5.0, min_margin=0.5, output="none"), deadline_ms=None)
    assert answering.policy == policy
    assert answering.infer({"image": images(1, 3)}).source == "edge_degraded", "what was answers on"
    answering.change(cloud=None, policy=None, deadline_ms=60_000.0)
    assert answering.infer({"image": images(1, 3)}).source == "edge"
    answering.close()


def test_who_watches_is_told_of_each_new_face_and_of_nothing_else(tmp_path: Path) -> None:
    with onnx_model(tmp_path) as model:
        answering = Answering(model, None, None, deadline_ms=None, state=tmp_path)
        faces: list[object] = []
        answering.attend(lambda: faces.append(answering.face))
        answering.change(cloud=None, policy=None, deadline_ms=None)
        assert faces == [model], "nothing is another"
        cloud = open_cloud(CloudConfig(url="http://127.0.0.1:9", model="large"))
        answering.change(cloud=cloud, policy=Policy(deadline_ms=60_000.0), deadline_ms=None)
        hybrid = answering.face
        answering.change(cloud=cloud, policy=Policy(deadline_ms=60_000.0), deadline_ms=None)
        assert answering.face is hybrid and faces == [model, hybrid]
        done: list[int] = []
        answering.between(lambda: done.append(1))
        assert done == [1]
        answering.close()


def test_a_cloud_whose_certificates_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem"):
        open_cloud(CloudConfig(url="https://x", model="m", ca_file=tmp_path / "none.pem"))
    assert open_cloud(None) is None
