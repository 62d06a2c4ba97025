"""A recurrent model call by call: what the stream holds, when it changes, and when it does not."""

from __future__ import annotations

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider.prediction import Failure
from outrider.stream import Stream
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    DtypeError,
    NotFiniteError,
    OutriderError,
    RunnerClosed,
    ShapeError,
    UnknownTensor,
)
from support.hybrids import onnx_model
from support.memory import LENGTHS, memory_model, step
from support.told_failures import Told

KINDS = ("onnx", "tflite")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    made = {kind: memory_model(folder, kind) for kind in KINDS}
    yield made
    for model in made.values():
        model.close()


def frames(count=6, rows=1, length=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, rows, length)).astype(np.float32)


def by_hand(xs, h=None):
    """The answers of a whole sequence by numpy."""
    h = np.zeros((xs.shape[1], 1), np.float32) if h is None else h
    answers = []
    for x in xs:
        y, h = step(x, h)
        answers.append(y)
    return answers, h


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_call_by_call_is_the_whole_sequence(models, kind, rows):
    stream, xs = models[kind].stream(), frames(rows=rows)
    wanted, last = by_hand(xs)
    for x, y in zip(xs, wanted, strict=True):
        prediction = stream.infer({"x": x})
        assert set(prediction.outputs) == {"y"}
        np.testing.assert_allclose(prediction.outputs["y"], y, atol=1e-5)
    np.testing.assert_allclose(stream.state["h"], last, atol=1e-5)


def test_the_prediction_says_where_it_came_from(models):
    prediction = models["onnx"].stream().infer(frames()[0])
    assert (prediction.variant, prediction.engine, prediction.source) == ("onnx-float32", "onnxruntime", "edge")
    assert prediction.timing_ms.total > 0


def test_an_array_will_do_where_one_input_is_no_state(models):
    first, second = models["onnx"].stream(), models["onnx"].stream()
    for x in frames():
        named, bare = first.infer({"x": x}).outputs["y"], second.infer(x).outputs["y"]
        assert np.array_equal(named, bare)


def test_streams_of_one_model_do_not_share_their_state(models):
    one, other = models["onnx"].stream(), models["onnx"].stream()
    for x in frames(seed=1):
        one.infer(x)
    xs = frames(seed=2)
    for x, y in zip(xs, by_hand(xs)[0], strict=True):
        np.testing.assert_allclose(other.infer(x).outputs["y"], y, atol=1e-5)


def test_reset_begins_anew_and_allows_another_n(models):
    stream = models["onnx"].stream()
    for x in frames():
        stream.infer(x)
    stream.reset()
    xs = frames(rows=2, seed=3)
    np.testing.assert_allclose(stream.infer(xs[0]).outputs["y"], by_hand(xs)[0][0], atol=1e-5)


def test_a_stream_begins_and_begins_anew_with_what_was_given(models):
    begun = np.float32([[2.0]])
    stream, xs = models["onnx"].stream(initial={"h": begun}), frames()
    begun[:] = 9.0  # it is the caller's to change
    for _ in range(2):
        for x, y in zip(xs, by_hand(xs, np.float32([[2.0]]))[0], strict=True):
            np.testing.assert_allclose(stream.infer(x).outputs["y"], y, atol=1e-5)
        stream.reset()
    assert stream.state["h"] == 2.0


def test_a_state_that_was_taken_out_goes_on_in_another_stream(models):
    xs = frames()
    first = models["onnx"].stream()
    for x in xs[:3]:
        first.infer(x)
    second = models["tflite"].stream(initial=first.state)
    first.state["h"][:] = 100.0  # a copy
    for at in (3, 4, 5):
        np.testing.assert_allclose(second.infer(xs[at]).outputs["y"], by_hand(xs)[0][at], atol=1e-5)


@pytest.mark.parametrize(
    ("error", "inputs"),
    [
        (NotFiniteError, {"x": np.full((1, 3), np.nan, np.float32)}),
        (DtypeError, {"x": np.zeros((1, 3))}),
        (ShapeError, {"x": np.zeros((1, 3, 1), np.float32)}),
        (ShapeError, {"x": np.zeros((1, 4), np.float32)}),
        (UnknownTensor, {}),
        (UnknownTensor, {"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)}),
        (UnknownTensor, {"x": np.zeros((1, 3), np.float32), "h": np.zeros((1, 1), np.float32)}),
    ],
)
def test_a_failed_call_leaves_the_state_as_it_was(models, error, inputs):
    stream, xs = models["tflite"].stream(), frames()
    wanted, _ = by_hand(xs)
    for x, y in zip(xs, wanted, strict=True):
        held = stream.state
        with pytest.raises(error):
            stream.infer(inputs)
        assert all(np.array_equal(stream.state[name], held[name]) for name in held)
        np.testing.assert_allclose(stream.infer(x).outputs["y"], y, atol=1e-5)


@pytest.mark.parametrize("over", ["model", "hybrid"])
@pytest.mark.parametrize(
    ("error", "inputs"),
    [
        (ShapeError, np.zeros((2, 3), np.float32)),  # another N than the state's
        (UnknownTensor, {"x": np.zeros((1, 3), np.float32), "h": np.zeros((1, 1), np.float32)}),
        (NotFiniteError, np.full((1, 3), np.nan, np.float32)),  # what the model itself refuses
        (UnknownTensor, {}),
    ],
)
def test_a_refused_call_is_told_once_whoever_refuses_it(models, tmp_path, over, error, inputs):
    with Hybrid(models["onnx"], models["onnx"], Policy(None), root=tmp_path) as hybrid:
        source = {"model": models["onnx"], "hybrid": hybrid}[over]
        stream, told = source.stream(), Told(source)
        stream.infer(frames()[0])
        with pytest.raises(error) as raised:
            stream.infer(inputs)
        told.end()
        with pytest.raises(error):
            stream.infer(inputs)
        assert told.failures == [Failure(raised.value, refused=True)]
        assert len(told.predictions) == 1


def test_a_late_call_leaves_the_state_as_it_was(models):
    stream, xs = models["onnx"].stream(), frames()
    stream.infer(xs[0])
    held = stream.state["h"]
    with pytest.raises(DeadlineExceeded):
        stream.infer(xs[1], deadline_ms=1e-6)
    assert np.array_equal(stream.state["h"], held)
    np.testing.assert_allclose(stream.infer(xs[1], deadline_ms=60_000.0).outputs["y"], by_hand(xs)[0][1], atol=1e-5)


def test_another_n_than_the_state_has_is_said_in_the_streams_words(models):
    stream = models["onnx"].stream()
    stream.infer(frames()[0])
    with pytest.raises(ShapeError, match="N = 2, the stream holds the state of 1") as caught:
        stream.infer(frames(rows=2)[0])
    assert "reset()" in caught.value.hint


def test_a_length_may_change_from_call_to_call(models):
    """The state has no T."""
    stream, h = models["tflite"].stream(), np.zeros((1, 1), np.float32)
    for at, length in enumerate((*LENGTHS, *LENGTHS)):
        x = frames(1, length=length, seed=at)[0]
        y, h = step(x, h)
        np.testing.assert_allclose(stream.infer(x).outputs["y"], y, atol=1e-5)


def test_a_model_without_state_has_no_stream(tmp_path):
    with onnx_model(tmp_path) as model, pytest.raises(ConfigError, match="no state"):
        model.stream()


def test_a_beginning_for_what_is_no_state(models):
    with pytest.raises(UnknownTensor, match="'x' is no state") as caught:
        models["onnx"].stream(initial={"x": np.zeros((1, 3), np.float32)})
    assert "'h'" in caught.value.hint


def test_a_beginning_of_another_shape_fails_at_the_first_call(models):
    stream = models["onnx"].stream(initial={"h": np.zeros((1, 2), np.float32)})
    with pytest.raises(ShapeError, match="'h'"):
        stream.infer(frames()[0])


def test_after_the_model_was_closed(tmp_path):
    model = memory_model(tmp_path)
    stream = model.stream()
    stream.infer(frames()[0])
    model.close()
    with pytest.raises(RunnerClosed):
        stream.infer(frames()[0])


def test_over_a_hybrid_whose_edge_fails_the_state_goes_on_in_the_cloud(tmp_path):
    """Both sides are the same network; the edge is closed in the middle of the sequence."""
    edge, cloud = memory_model(tmp_path), memory_model(tmp_path, "tflite")
    xs, sources = frames(), []
    with cloud, Hybrid(edge, cloud, Policy(deadline_ms=60_000.0)) as hybrid:
        stream = hybrid.stream()
        for at, (x, y) in enumerate(zip(xs, by_hand(xs)[0], strict=True)):
            if at == 3:
                edge.close()
            prediction = stream.infer(x)
            sources.append(prediction.source)
            np.testing.assert_allclose(prediction.outputs["y"], y, atol=1e-5)
    assert sources == ["edge"] * 3 + ["cloud"] * 3


def test_a_stream_is_over_whatever_answers_at_an_interface(models):
    class Failing:
        """A model whose every second call fails after it ran."""

        def __init__(self, model):
            self.interface, self._model, self._calls = model.interface, model, 0

        def infer(self, inputs, *, deadline_ms=None):
            prediction = self._model.infer(inputs, deadline_ms=deadline_ms)
            self._calls += 1
            if self._calls % 2:
                raise OutriderError("lost on the way")
            return prediction

    stream, xs = Stream(Failing(models["onnx"])), frames()
    for x, y in zip(xs, by_hand(xs)[0], strict=True):
        with pytest.raises(OutriderError, match="lost"):
            stream.infer(x)
        np.testing.assert_allclose(stream.infer(x).outputs["y"], y, atol=1e-5)
