"""A wrong kind of argument is named before anything is done, with what would do."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from outrider_exporters import MaxDrop, Offload, Quantize, Recipe
from outrider_exporters.arguments import _KINDS, checked
from outrider_exporters.export import export
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.processing import Softmax

RIGHT = {
    "example": {"x": np.zeros(1)},
    "golden": {"x": np.zeros(1)},
    "outputs": ["logits"],
    "formats": ("onnx",),
    "targets": [],
    "labels": ("a", "b"),
    "axes": {"x": "NC"},
    "meanings": {"x": "what it is"},
    "dynamic_axes": {"x": "T"},
    "state": {"h": "h_next"},
    "ranges": {"x": (0.0, 1)},
    "shapes": {"T": [8, 16]},
    "preprocessing": [],
    "postprocessing": (Softmax(tensor="logits"),),
    "recipe": Recipe([Quantize()]),
    "gates": [MaxDrop("accuracy", points=1.0)],
    "offload": Offload(),
    "cloud_only": True,
    "signing_keys": [object()],
    "evaluate": print,
    "fit": print,
    "is_wrong": print,
    "progress": print,
    "output": Path("a"),
    "report": "a.html",
    "name": "a",
    "command": "",
}
WRONG = {
    "example": [[np.zeros(1)], {1: np.zeros(1)}],
    "golden": [3],
    "outputs": ["logits", [1], 3],
    "formats": ["onnx", [None]],
    "targets": ["pi4"],
    "labels": ["abc", [1, 2]],
    "axes": [{"x": 3}, "NC"],
    "meanings": [{"x": 3}],
    "dynamic_axes": [{"x": 3}, ["T"]],
    "state": [[("h", "h_next")], {"h": 1}],
    "ranges": [{"x": 3}, {"x": (0, 1, 2)}, {"x": ("low", "high")}, {"x": (True, 2)}],
    "shapes": [{"T": 8}, {"T": [8.0]}, {"T": [True]}],
    "preprocessing": [["softmax"], Softmax(tensor="x"), [Softmax]],
    "postprocessing": [[{"step": "softmax"}]],
    "recipe": [[Quantize()], Quantize()],
    "gates": [MaxDrop("accuracy", points=1.0), [MaxDrop], ["max_drop"]],
    "offload": [0.01, Offload],
    "cloud_only": [1, "yes"],
    "signing_keys": ["release.key", 3],
    "evaluate": [{"accuracy": 1.0}],
    "fit": [3],
    "is_wrong": ["wrong"],
    "progress": [3],
    "output": [3, None.__class__],
    "report": [3],
    "name": [3],
    "command": [["outrider"]],
}


PARAMETERS = inspect.signature(export).parameters


def test_every_argument_of_its_kind_is_taken_and_none_is_left_out():
    for name, value in RIGHT.items():
        called(name, value)
        if PARAMETERS[name].default is None:
            called(name, None)
    assert set(RIGHT) == set(_KINDS) == set(WRONG)
    elsewhere = {"model", "data", "teacher", "version", "seed"}  # looked at where they are used
    assert set(PARAMETERS) - elsewhere == set(_KINDS)


def called(name, value):
    """What comes of a function with that one argument, which has the default that it has in ``export``."""

    def function(**_given):
        pass

    function.__signature__ = inspect.Signature([PARAMETERS[name]])
    checked(function)(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_kind_is_named_with_what_would_do(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .*, expected ") as caught:
        called(name, value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [name for name in _KINDS if PARAMETERS[name].default is not None])
def test_none_is_refused_where_it_is_not_the_default(name):
    with pytest.raises(ConfigError, match=rf"^{name} is None, expected "):
        called(name, None)


def test_arguments_by_position_are_looked_at_too():
    @checked
    def function(example, recipe=None):
        return example, recipe

    assert function({}, None) == ({}, None)
    with pytest.raises(ConfigError, match=r"^recipe is 3, expected a Recipe"):
        function({}, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'recipes'"):
        function({}, recipes=3)


@pytest.mark.parametrize("name", ["recipe", "gates", "outputs", "example", "ranges", "preprocessing", "progress"])
def test_export_says_it_before_it_looks_at_the_model(name):
    arguments = {"data": None, "evaluate": print, "output": "a.outrider", "example": {}, "outputs": ["y"]}
    with pytest.raises(ConfigError, match=rf"^{name} is "):
        export(object(), **{**arguments, name: WRONG[name][0] if name != "outputs" else [1]})
