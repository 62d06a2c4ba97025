"""Who is told of a Model's predictions."""

from __future__ import annotations

import pytest

from outrider.model import Prediction
from support.doubling import ONE, Gate, bound, model_of


def test_each_prediction_goes_to_every_callback_until_it_is_taken_off(gate: Gate) -> None:
    model = model_of(bound(gate))
    seen: dict[str, list[Prediction]] = {"a": [], "b": []}
    take_off = model.on_prediction(seen["a"].append)
    model.on_prediction(seen["b"].append)
    first = model.infer(ONE)
    second = model.infer(ONE, deadline_ms=120_000.0)
    take_off()
    take_off()
    third = model.infer(ONE)
    assert seen["a"] == [first, second]
    assert seen["b"] == [first, second, third]
    model.close()


def test_the_same_callback_twice_is_two(gate: Gate) -> None:
    model = model_of(bound(gate))
    seen: list[Prediction] = []
    model.on_prediction(seen.append)
    take_off = model.on_prediction(seen.append)
    model.infer(ONE)
    take_off()
    model.infer(ONE)
    assert len(seen) == 3


def test_a_callback_that_fails_loses_no_answer_and_is_logged_once(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(bound(gate))
    seen: list[Prediction] = []

    def fail(_: Prediction) -> None:
        raise RuntimeError("the disk is full")

    model.on_prediction(fail)
    model.on_prediction(seen.append)
    for _ in range(3):
        assert model.infer(ONE).outputs["y"][0] == 2.0
    assert len(seen) == 3
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("the disk is full",)]


def test_an_unsubscribe_inside_a_callback_is_safe(gate: Gate) -> None:
    model = model_of(bound(gate))
    calls: list[int] = []
    take_off = model.on_prediction(lambda _: (calls.append(1), take_off())[0])
    model.infer(ONE)
    model.infer(ONE)
    assert calls == [1]
