"""What an endpoint offers by name and version, and that it is asked of the runner each time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.endpoint.models import Models, Served
from outrider.model import Model, load
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, OutriderError, QueueFull, UnknownModel
from support.doubling import bound, model_of, result, x
from support.endpoints import served
from support.hybrids import onnx_model


def test_the_highest_version_is_the_default_and_each_is_found_by_its_number():
    models = Models([served(9), served(10), served(2), served(1, "cats")])
    assert models.names() == ("digits", "cats")
    assert models.versions("digits") == (2, 9, 10)
    assert models.find("digits").version == 10
    assert [models.find("digits", str(version)).version for version in (2, 9, 10)] == [2, 9, 10]
    assert models.find("cats").version == models.find("cats", "1").version == 1
    assert (len(models), len(list(models))) == (4, 4)


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("dogs", None, "no model 'dogs'"),
        ("", None, "no model ''"),
        ("digits", "3", "no version '3'"),
        ("digits", "02", "no version '02'"),
        ("digits", "2.0", "no version"),
        ("digits", "", "no version ''"),
        ("digits", "9" * 5000, "no version '9999999999999999'"),
        ("x" * 5000, "1", "no model 'xxx"),
    ],
)
def test_what_is_not_there_is_a_typed_error_that_says_what_is(name, version, says):
    with pytest.raises(UnknownModel, match=says) as caught:
        Models([served(2), served(9)]).find(name, version)
    assert isinstance(caught.value, OutriderError) and len(str(caught.value)) < 150
    assert caught.value.hint in ("it has 2, 9", "GET /v2/models lists them")
    with pytest.raises(UnknownModel):
        Models().versions("digits")


def test_two_of_one_name_and_version_are_refused():
    with pytest.raises(ConfigError, match="'digits' and have version 2"):
        Models([served(2), served(3), served(2)])
    assert len(Models([served(2), served(2, "cats")])) == 2


def test_a_rollback_is_told_from_the_next_look_on():
    models = Models([served(7)])
    found = models.find("digits")
    found.runner.bundle = replace(found.runner.bundle, version=6, digest="a" * 64)  # type: ignore[misc]
    found.runner.variant, found.runner.sick = "onnx-float32", True  # type: ignore[misc]
    assert (found.version, found.bundle, found.variant, found.ready) == (6, "a" * 64, "onnx-float32", False)
    assert models.versions("digits") == (6,) and models.find("digits", "6") is found
    with pytest.raises(UnknownModel, match="no version '7'"):
        models.find("digits", "7")


def test_a_model_is_what_a_registry_asks_for(tmp_path):
    with onnx_model(tmp_path) as model:
        found = Models([Served(name="tiny", runner=model)]).find("tiny", "1")
        assert isinstance(found.runner, Model) and found.interface is model.interface
        assert (found.bundle, found.variant, found.engine) == (model.bundle.digest, model.variant, model.engine)
        assert found.ready


def test_a_model_keeps_as_many_waiting_as_it_was_told(gate):
    with model_of(bound(gate), queue_size=1) as model:
        gate.stuck, never = True, Deadline.after_ms(None)
        taken = [model.submit(x(value), never) for value in (1.0, 2.0)]  # one runs, or soon will, and one waits
        with pytest.raises(QueueFull, match="no more than 2 may"):
            model.submit(x(3.0), never)
        gate.go.set()
        assert [result(future) for future in taken] == [2.0, 4.0]


@pytest.mark.parametrize("size", [-1, 1.5, "8", True])
def test_a_queue_of_no_size_is_refused_at_load(tmp_path, size):
    with pytest.raises(ConfigError, match="queue_size is"):
        load("digits", state=tmp_path, queue_size=size)
