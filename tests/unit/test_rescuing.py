"""When layers are kept in float: only where no other form of the variant will do."""

from __future__ import annotations

import pytest

from outrider_exporters.candidates import plans
from outrider_exporters.choose import resolved
from outrider_exporters.passes import Quantize
from outrider_exporters.rescuing import stood_in_for
from outrider_runtimes.board import Board

VNNI = Board(machine="x86_64", features=frozenset(["avx2", "avx512_vnni"]), cpus=1, memory_bytes=0, python="3.11.9")


STATIC = (Quantize(),)


def stands_in(kind, targets, good, rules=STATIC):
    boards = [resolved(name, VNNI) for name in targets]
    made = plans(("onnx", "tflite"), "float32", rules, boards, VNNI)
    (plan,) = [item for item in made if item.name == f"{kind}-int8"]
    return stood_in_for(plan, made, boards, lambda name: name in good)


@pytest.mark.parametrize(
    ("kind", "targets", "good", "answer"),
    [
        ("onnx", ("native",), {"onnx-int8-u8s8"}, True),
        ("onnx", ("native",), {"onnx-int8-per-tensor"}, True),
        ("onnx", ("native",), set(), False),
        # A board that takes signed activations has nothing of an unsigned form.
        ("onnx", ("pi4",), {"onnx-int8-u8s8"}, False),
        ("onnx", ("native", "pi4"), {"onnx-int8-u8s8"}, False),
        ("onnx", ("native", "pi4"), {"onnx-int8-u8s8", "onnx-int8-per-tensor"}, True),
        # Another board's format is nothing to it, and neither is another variant of the recipe.
        ("onnx", ("pi-32bit", "native"), {"onnx-int8-u8s8"}, True),
        ("tflite", ("native",), {"onnx-int8-u8s8", "onnx-int8"}, False),
        # Dynamic int8 computes in another way: slower where static int8 is what a network needs.
        ("tflite", ("native",), {"tflite-dynamic"}, False),
        ("tflite", ("native",), {"tflite-int8-float-io"}, True),
        ("onnx", (), {"onnx-int8-u8s8"}, False),
    ],
)
def test_another_form_stands_in_where_every_target_can_take_it(kind, targets, good, answer):
    assert stands_in(kind, targets, good) is answer


def test_the_variant_itself_does_not_stand_in_for_itself():
    assert not stands_in("onnx", ("native",), {"onnx-int8"})


def test_another_rule_of_the_recipe_does_not_stand_in():
    rules = (Quantize(), Quantize("weight-only"))
    assert not stands_in("onnx", ("native",), {"onnx-weight-only"}, rules)
