from __future__ import annotations

import dataclasses

import pytest

from outrider_exporters import QAT, Prune, Quantize, Recipe
from outrider_exporters.passes.quantize import ACTIVATIONS, SCHEMES
from outrider_runtimes.errors import ConfigError


def test_the_plain_rule_is_static_int8():
    assert Quantize() == Quantize("int8", per_channel=True, activations="int8", observer="min-max", keep_float=())
    assert SCHEMES == ("int8", "dynamic", "weight-only", "float16", "int4")
    assert ACTIVATIONS == ("int8", "uint8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quantize().scheme = "int4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "scheme is 'int3', expected one of int8, dynamic, weight-only, float16, int4"),
        ({"scheme": 8}, "scheme is 8, expected a string"),
        ({"per_channel": 1}, "per_channel is 1, expected true or false"),
        ({"activations": "int16"}, "activations is 'int16', expected one of int8, uint8"),
        ({"observer": "entropy"}, "observer is 'entropy', expected one of min-max, percentile, mse"),
        ({"keep_float": "head"}, "keep_float is 'head', expected a list of strings"),
        ({"keep_float": ("head", 3)}, "expected a list of strings"),
        ({"keep_float": ("",)}, "keep_float has an empty name"),
        (
            {"scheme": "dynamic", "observer": "mse"},
            "activations, operators, io and observer are of scheme 'int8', not of 'dynamic'",
        ),
        ({"scheme": "weight-only", "activations": "uint8"}, "not of 'weight-only'"),
        ({"scheme": "int4", "per_channel": False}, "per_channel is of integer weights in 8 bits, not of scheme 'int4'"),
    ],
)
def test_what_a_rule_may_not_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Quantize(**options)


@pytest.mark.parametrize(
    "rule",
    [
        Quantize(),
        Quantize("dynamic", per_channel=False),
        Quantize("int4", keep_float=["head", "onnx:node_add"]),
        Quantize(activations="uint8", observer="percentile"),
    ],
)
def test_a_rule_is_data(rule):
    assert hash(rule) == hash(dataclasses.replace(rule))
    recipe = Recipe([rule])
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_file_has_every_option(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[[passes]]\ntype = 'quantize'\nscheme = 'int8'\nper_channel = false\nactivations = 'uint8'\n"
        "observer = 'mse'\nkeep_float = ['head', 'tflite:x;1']\n[[passes]]\ntype = 'quantize'\nscheme = 'weight-only'\n"
    )
    assert Recipe.from_toml(path).quantizations == (
        Quantize("int8", per_channel=False, activations="uint8", observer="mse", keep_float=("head", "tflite:x;1")),
        Quantize("weight-only"),
    )


def test_training_with_rounding_is_a_pass_of_a_recipe(tmp_path):
    recipe = Recipe([Prune(ratio=0.5), QAT(rounds=2, per_channel=False), Quantize(per_channel=False)])
    assert recipe.kinds == ("prune", "qat", "quantize")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[[passes]]\ntype = 'qat'\nrounds = 3\ncheckpoint = 'kept'\n"
        "[[passes]]\ntype = 'quantize'\nscheme = 'weight-only'\n[[passes]]\ntype = 'quantize'\n"
    )
    assert Recipe.from_toml(path).passes[0] == QAT(rounds=3, checkpoint="kept")
    with pytest.raises(ConfigError, match="rounds is 0"):
        QAT(rounds=0)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Quantize(), QAT()], "qat comes after quantize"),
        ([QAT()], r"passes\[0\]: qat trains for static int8"),
        ([QAT(), Quantize("dynamic")], r"passes\[0\]: qat trains for static int8"),
        ([QAT(), Prune(ratio=0.5), Quantize()], "other training would undo it"),
        ([QAT(per_channel=False), Quantize()], "qat has per_channel = False, quantize True"),
        ([QAT(), Quantize(observer="mse")], "quantize observes ranges by mse, and qat has trained them"),
    ],
)
def test_what_stands_behind_the_training_must_be_what_it_trains_for(passes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(passes)
