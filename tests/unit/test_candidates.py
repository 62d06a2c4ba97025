"""Which files are made for which targets."""

from __future__ import annotations

import pytest

from outrider_exporters.candidates import plans
from outrider_exporters.choose import resolved
from outrider_exporters.passes import Quantize
from outrider_runtimes.board import Board

BOTH = ("onnx", "tflite")
VNNI = Board(machine="x86_64", features=frozenset(["avx2", "avx512_vnni"]), cpus=1, memory_bytes=0, python="3.11.9")


def names(formats=BOTH, rules=(), targets=()):
    return [plan.name for plan in made(formats, rules, targets)]


def made(formats=BOTH, rules=(), targets=()):
    return plans(formats, "float32", rules, [resolved(name, VNNI) for name in targets], VNNI)


def test_without_targets_the_recipes_own_forms_alone_are_made():
    rules = (Quantize(), Quantize("dynamic"))
    assert names(rules=rules) == [f"{kind}-{form}" for kind in BOTH for form in ("float32", "int8", "dynamic")]
    assert all(plan.asked for plan in made(rules=rules))


def test_signed_targets_get_signed_forms():
    found = names(rules=(Quantize(),), targets=("pi4", "pi5"))
    assert found[:3] == ["onnx-float32", "onnx-int8", "onnx-int8-per-tensor"]
    assert not any("u8s8" in name or "qoperator" in name for name in found)
    assert "tflite-dynamic" in found


def test_unsigned_forms_are_made_where_a_target_takes_them():
    found = {plan.name: plan for plan in made(rules=(Quantize(observer="mse"),), targets=("pi4", "native"))}
    assert {"onnx-int8-u8s8", "onnx-int8-u8s8-per-tensor", "onnx-int8-u8s8-qoperator"} <= set(found)
    assert found["onnx-int8-u8s8-qoperator"].rule.operators == "qoperator"
    assert found["onnx-int8-u8s8"].rule == Quantize(activations="uint8", observer="mse")
    assert found["onnx-int8-u8s8"].slot == "onnx-int8"
    assert not found["onnx-int8-u8s8"].asked


def test_float_edges_are_worth_a_file_where_latency_is_measured():
    assert "tflite-int8-float-io" in names(rules=(Quantize(),), targets=("native",))
    assert "tflite-int8-float-io" not in names(rules=(Quantize(),), targets=("pi4", "pi5"))


def test_a_rule_that_names_its_form_gets_no_other():
    assert names(("onnx",), (Quantize(per_channel=False),), ("native",)) == ["onnx-float32", "onnx-int8"]
    assert names(("onnx",), (Quantize("float16"),), ("native",)) == ["onnx-float32", "onnx-float16"]


def test_formats_that_no_target_runs_are_not_made():
    assert names(rules=(Quantize(),), targets=("pi-32bit",))[0] == "tflite-float32"
    assert not any(name.startswith("onnx") for name in names(rules=(Quantize(),), targets=("pi-32bit",)))


def test_what_the_recipe_asks_for_is_not_made_twice():
    found = made(rules=(Quantize(), Quantize("dynamic")), targets=("pi4",))
    assert len(found) == len({plan.name for plan in found})
    assert [plan.asked for plan in found if plan.name == "tflite-dynamic"] == [True]


@pytest.mark.parametrize("targets", [(), ("pi4",), ("native", "pi-32bit")])
def test_each_formats_first_file_stands_before_what_is_made_of_it(targets):
    seen = set()
    for plan in made(rules=(Quantize(), Quantize("dynamic")), targets=targets):
        if plan.rule is None:
            seen.add(plan.format)
        assert plan.format in seen


def test_dynamic_int8_has_a_scale_a_weight_where_an_engine_misreads_one_a_channel():
    """tflite-runtime 2.14, the only engine of a 32-bit Pi, takes the first channel's scale for all."""
    for rules in ((Quantize(),), (Quantize("dynamic"),)):
        found = {plan.name: plan for plan in made(("tflite",), rules, ("pi-32bit", "pi5"))}
        assert found["tflite-dynamic"].rule.per_channel
        assert not found["tflite-dynamic-per-tensor"].rule.per_channel
        assert "tflite-dynamic-per-tensor" not in names(("tflite",), rules, ("pi5",))
    assert names(("tflite",), (Quantize("dynamic", per_channel=False),), ("pi-32bit",)) == [
        "tflite-float32",
        "tflite-dynamic",
    ]
