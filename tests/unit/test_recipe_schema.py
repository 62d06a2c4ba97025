"""docs/recipe.schema.json says what the dataclasses say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_exporters import (
    Distill,
    MaxDrop,
    MaxLatency,
    MaxMetric,
    MaxParityError,
    MaxSize,
    Metric,
    MinMetric,
    Offload,
    Prune,
    Quantize,
    Recipe,
)
from outrider_exporters.recipe import RecipeFile, to_toml
from outrider_exporters.recipe.schema import recipe_schema, schema_text
from outrider_runtimes.errors import ConfigError
from support.effort import effort

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = recipe_schema()

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = words.filter(bool)
gates = st.one_of(
    st.builds(MaxDrop, names | st.builds(Metric, names, st.booleans()), points=st.floats(0.0, 100.0)),
    st.builds(MinMetric, names, at_least=st.floats(-10.0, 10.0)),
    st.builds(MaxMetric, names, at_most=st.floats(-10.0, 10.0)),
    st.builds(MaxSize, st.integers(1, 10**9)),
    st.builds(MaxLatency, ms=st.floats(0.0, 1e3)),
    st.builds(MaxParityError, share=st.floats(0.0, 1.0)),
)
passes = st.sampled_from([Prune(ratio=0.5), Distill(epochs=3), Distill(output="logits")])
rules = st.sampled_from([Quantize(), Quantize("dynamic"), Quantize("int8", keep_float=("head.1", 'a "b"'))])
files = st.builds(
    RecipeFile,
    source=st.sampled_from(["", "network:build"]),
    name=st.none() | st.just("digits"),
    version=st.integers(1, 99),
    formats=st.sampled_from([(), ("onnx",), ("onnx", "tflite")]),
    targets=st.sampled_from([(), ("pi4", "pi5")]),
    labels=st.lists(words, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
    recipe=st.builds(lambda p, q: Recipe([*p, *q]), st.lists(passes, max_size=2), st.lists(rules, max_size=2)),
    gates=st.lists(gates, max_size=3).map(tuple),
    offload=st.none() | st.builds(Offload, alpha=st.floats(0.001, 0.9), score=st.sampled_from(["margin", "energy"])),
    cloud_only=st.booleans(),
)


def validator():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def test_the_file_is_what_the_dataclasses_say():
    found = (DOCS / "recipe.schema.json").read_text(encoding="utf-8")
    assert found == schema_text(), "run: python -m outrider_exporters.recipe.schema > docs/recipe.schema.json"


def test_the_example_recipe_fits_the_schema():
    data = tomllib.loads((DOCS / "recipes/digits/recipe.toml").read_text(encoding="utf-8"))
    validator().validate(data)


@settings(max_examples=effort(50), deadline=None)
@given(files)
def test_every_recipe_file_fits_the_schema(file):
    validator().validate(json.loads(json.dumps(file.to_dict())))


@settings(max_examples=effort(50), deadline=None)
@given(files)
def test_what_is_written_as_toml_is_read_back(file):
    assert RecipeFile.from_dict(tomllib.loads(to_toml(file.to_dict()))) == file


@pytest.mark.parametrize(
    "data",
    [
        {"modle": {}},
        {"model": {"sorce": "a:b"}},
        {"version": 0},
        {"version": "1"},
        {"formats": ["pytorch"]},
        {"targets": ["pi9"]},
        {"name": "Digits Net"},
        {"passes": [{"ratio": 0.5}]},
        {"passes": [{"type": "prun"}]},
        {"passes": [{"type": "prune", "ratoi": 0.5}]},
        {"passes": [{"type": "distill", "epochs": 2.5}]},
        {"gates": [{"type": "max_drop", "metric": "accuracy"}]},
        {"gates": [{"type": "max_drop", "metric": {"nam": "x"}, "points": 1.0}]},
        {"gates": [{"type": "max_size", "bytes": "many"}]},
        {"offload": {"alfa": 0.1}},
        {"cloud_only": 1},
        {"offload": {"alpha": "little"}},
    ],
)
def test_what_does_not_fit_is_refused(data):
    assert not validator().is_valid(data)


def test_the_schema_and_the_reader_know_the_same_keys():
    for key in SCHEMA["properties"]:
        try:
            RecipeFile.from_dict({key: object()})
        except ConfigError as error:
            assert "unknown key" not in str(error)
    with pytest.raises(ConfigError, match="unknown key"):
        RecipeFile.from_dict({"report": "x.html"})


def test_a_metric_of_which_lower_is_better_is_a_table():
    (gate,) = RecipeFile.from_dict(
        tomllib.loads("gates = [{type = 'max_drop', metric = {name = 'error', higher_is_better = false}, points = 2}]")
    ).gates
    assert gate == MaxDrop(Metric("error", higher_is_better=False), points=2.0)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("{nam = 'x'}", r"gates\[0\].metric.nam: unknown key"),
        ("{higher_is_better = true}", r"gates\[0\].metric.name: missing"),
        ("{name = 'x', higher_is_better = 1}", r"gates\[0\].metric.higher_is_better: expected true or false"),
        ("{name = ''}", r"gates\[0\].metric: name is empty"),
        ("3", r"gates\[0\].metric: expected a metric's name or a Metric"),
    ],
)
def test_a_wrong_metric_is_named_with_its_path(metric, words):
    text = f"gates = [{{type = 'max_drop', metric = {metric}, points = 2}}]"
    with pytest.raises(ConfigError, match=words):
        RecipeFile.from_dict(tomllib.loads(text))
