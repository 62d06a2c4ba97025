"""A recipe is a frozen value and a TOML file; whatever is wrong in it is named with its path."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters import Distill, MaxDrop, MaxSize, MinMetric, Prune, Quantize, Recipe
from outrider_exporters.recipe import RecipeFile, to_toml
from outrider_runtimes.errors import ConfigError

positive = st.floats(1e-6, 1e3)
prunes = st.builds(Prune, ratio=st.floats(0.01, 0.99), round_to=st.integers(1, 64))
distills = st.builds(
    Distill,
    temperature=positive,
    alpha=st.floats(0.0, 1.0),
    epochs=st.integers(1, 100),
    batch_size=st.integers(1, 512),
    learning_rate=positive,
    output=st.sampled_from(["", "logits"]),
)
recipes = st.builds(
    lambda first, last: Recipe([*first, *last]),
    st.lists(prunes | distills, max_size=4),
    st.lists(st.just(Quantize("int8")), max_size=2),
)

FULL = """
name = "digits"
version = 3
formats = ["onnx"]
targets = ["pi4", "pi5"]
labels = ["zero", "one"]
seed = 7

[model]
source = "network:build"

[[passes]]
type = "prune"
ratio = 0.5

[[passes]]
type = "distill"
temperature = 4

[[passes]]
type = "quantize"

[[gates]]
type = "max_drop"
metric = "accuracy"
points = 1.0

[[gates]]
type = "max_size"
bytes = 20000
"""


def write(tmp_path, text):
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return file


@given(recipes)
def test_to_dict_and_from_dict_are_inverse_and_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_is_a_frozen_value():
    recipe = Recipe([Prune(ratio=0.5), Quantize("int8")])
    assert recipe == Recipe((Prune(ratio=0.5), Quantize()))
    assert hash(recipe) == hash(Recipe((Prune(ratio=0.5), Quantize())))
    assert recipe.kinds == ("prune", "quantize")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.passes = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.passes[0].ratio = 0.1  # type: ignore[misc]


def test_network_passes_keep_their_order_and_later_quantization_rules_win():
    recipe = Recipe([Prune(ratio=0.2), Distill(), Prune(ratio=0.3), Quantize("int8"), Quantize("int8")])
    assert [p.kind for p in recipe.network_passes] == ["prune", "distill", "prune"]
    assert recipe.quantizations == (Quantize("int8"),)
    assert Recipe().passes == ()


def test_a_whole_file_is_read_and_comes_back(tmp_path):
    file = RecipeFile.from_toml(write(tmp_path, FULL))
    assert file.source == "network:build"
    assert (file.name, file.version, file.seed) == ("digits", 3, 7)
    assert (file.formats, file.targets, file.labels) == (("onnx",), ("pi4", "pi5"), ("zero", "one"))
    assert file.recipe == Recipe([Prune(ratio=0.5), Distill(temperature=4.0), Quantize("int8")])
    assert file.gates == (MaxDrop("accuracy", points=1.0), MaxSize(20000))
    assert isinstance(file.recipe.passes[1].temperature, float)
    assert Recipe.from_toml(file.path) == file.recipe
    assert dataclasses.replace(RecipeFile.from_dict(file.to_dict()), path=file.path) == file


def test_an_empty_file_is_an_export_as_it_is(tmp_path):
    file = RecipeFile.from_toml(write(tmp_path, ""))
    assert file.recipe == Recipe()
    assert file.formats == ()  # all that can be made of the model
    assert file.gates == ()


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("modle = 1", "modle: unknown key", "did you mean 'model'?"),
        ("offload = 1", "offload: expected a table", "[offload]"),
        ("cloud_only = 1", "cloud_only: expected true or false", ""),
        ("[offload]\nalfa = 0.1", "offload.alfa: unknown key", "did you mean 'alpha'?"),
        ("[offload]\nalpha = 'x'", "offload.alpha: expected a number", ""),
        ("[offload]\nalpha = 2.0", "offload: alpha is 2.0, expected a number above 0 and below 1", ""),
        ("[model]\nsorce = 'a:b'", "model.sorce: unknown key", "did you mean 'source'?"),
        ("model = 3", "model: expected a table", "[model]"),
        ("[model]\nsource = 3", "model.source: expected a string", ""),
        ("version = 1.5", "version: expected an integer", ""),
        ("version = true", "version: expected an integer", ""),
        ("name = 3", "name: expected a string", ""),
        ("formats = 'onnx'", "formats: expected a list of strings", ""),
        ("targets = ['pi4', 5]", "targets[1]: expected a string", ""),
        ("passes = 3", "passes: expected a list of tables", "[[passes]]"),
        ("passes = [3]", "passes[0]: expected a table", ""),
        ("[[passes]]\nratio = 0.5", "passes[0].type: missing", "one of"),
        ("[[passes]]\ntype = 'prun'", "passes[0].type: unknown: 'prun'", "did you mean 'prune'?"),
        ("[[passes]]\ntype = 3", "passes[0].type: unknown: 3", "one of"),
        (
            "[[passes]]\ntype = 'quantize'\n[[passes]]\ntype = 'distill'\ntemprature = 4.0",
            "passes[1].temprature: unknown key",
            "did you mean 'temperature'?",
        ),
        ("[[passes]]\ntype = 'prune'", "passes[0]: ratio is 0.0", "Prune(macs=0.5)"),
        ("[[passes]]\ntype = 'prune'\nratio = '0.5'", "passes[0].ratio: expected a number, not '0.5'", ""),
        ("[[passes]]\ntype = 'prune'\nratio = true", "passes[0].ratio: expected a number", ""),
        ("[[passes]]\ntype = 'prune'\nratio = 1.5", "passes[0]: ratio is 1.5", ""),
        ("[[passes]]\ntype = 'prune'\nratio = nan", "passes[0]: ratio is nan", ""),
        ("[[passes]]\ntype = 'distill'\nepochs = 2.5", "passes[0].epochs: expected an integer", ""),
        ("[[passes]]\ntype = 'quantize'\nscheme = 'int2'", "passes[0]: scheme is 'int2'", ""),
        ("[[gates]]\ntype = 'max_drop'\nmetric = 'accuracy'", "gates[0].points: missing", ""),
        ("[[gates]]\ntype = 'max_drop'\nmetric = 'accuracy'\npoint = 1", "gates[0].point: unknown key", "'points'"),
        ("[[gates]]\ntype = 'max_size'\nbytes = -5", "gates[0]: bytes is -5", ""),
    ],
)
def test_what_is_wrong_is_named_with_its_path(tmp_path, text, path, hint):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        RecipeFile.from_toml(file)
    assert str(caught.value).startswith(f"{file}: {path}")
    assert hint in caught.value.hint


def test_from_dict_names_the_path_too():
    with pytest.raises(ConfigError, match=r"^passes\[0\].rato: unknown key"):
        Recipe.from_dict({"passes": [{"type": "prune", "rato": 0.5}]})
    with pytest.raises(ConfigError, match=r"^gates: unknown key"):
        Recipe.from_dict({"passes": [], "gates": []})


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"name = ", "is not TOML"), (b"\xff\xfe", "is not TOML"), (None, "cannot be read")],
)
def test_files_that_are_no_toml(tmp_path, content, words):
    file = tmp_path / "recipe.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        RecipeFile.from_toml(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prune(ratio=0.0), "ratio is 0.0"),
        (lambda: Prune(ratio=1.0), "ratio is 1.0"),
        (lambda: Prune(ratio=0.5, round_to=0), "round_to is 0"),
        (lambda: Distill(temperature=0.0), "temperature is 0.0"),
        (lambda: Distill(temperature=float("inf")), "temperature is inf"),
        (lambda: Distill(alpha=1.5), "alpha is 1.5"),
        (lambda: Distill(epochs=0), "epochs is 0"),
        (lambda: Distill(batch_size=0), "batch_size is 0"),
        (lambda: Distill(learning_rate=-1.0), "learning_rate is -1.0"),
        (lambda: Quantize("int3"), "scheme is 'int3'"),
        (lambda: Recipe([Quantize("int8"), Prune(ratio=0.5)]), r"passes\[1\]: prune comes after quantize"),
        (lambda: Recipe(["prune"]), r"passes\[0\] is a str"),
    ],
)
def test_values_that_make_no_sense_are_refused_where_they_are_made(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_gates_of_a_file_are_the_python_ones(tmp_path):
    text = "[[gates]]\ntype = 'min_metric'\nmetric = 'f1'\nat_least = 1"
    (gate,) = RecipeFile.from_toml(write(tmp_path, text)).gates
    assert gate == MinMetric("f1", at_least=1.0)


@pytest.mark.timeout(120)
def test_a_pipe_is_no_recipe_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        RecipeFile.from_toml(tmp_path / "recipe.toml")


NAMED = {"dynamic_axes": {"tokens": "T"}, "shapes": {"T": (8, 16)}, "state": {"h": "h_next"}}


def test_free_axes_their_sizes_and_state_are_tables(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[dynamic_axes]\ntokens = "T"\n[shapes]\nT = [8, 16]\n[state]\nh = "h_next"\n')
    file = RecipeFile.from_toml(path)
    assert {key: getattr(file, key) for key in NAMED} == NAMED
    assert RecipeFile.from_dict(file.to_dict()) == RecipeFile.from_dict(RecipeFile(**NAMED).to_dict())
    path.write_text(to_toml(file.to_dict()))
    assert {key: getattr(RecipeFile.from_toml(path), key) for key in NAMED} == NAMED
    assert not NAMED.keys() & RecipeFile().to_dict().keys()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"dynamic_axes": "T"}, "dynamic_axes: expected a table"),
        ({"dynamic_axes": {"tokens": 1}}, "dynamic_axes.tokens: expected"),
        ({"shapes": {"T": 8}}, "shapes.T: expected a list of whole numbers"),
        ({"shapes": {"T": [8, "16"]}}, r"shapes.T\[1\]: expected"),
        ({"shapes": {"T": [True]}}, r"shapes.T\[0\]: expected"),
        ({"state": [["h", "h_next"]]}, "state: expected a table"),
        ({"state": {"h": ["h_next"]}}, "state.h: expected"),
    ],
)
def test_odd_tables_are_named(data, words):
    with pytest.raises(ConfigError, match=words):
        RecipeFile.from_dict(data)
