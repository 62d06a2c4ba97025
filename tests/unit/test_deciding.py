"""What goes into a bundle, from measured figures: gates and targets together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from outrider_exporters import Data, MaxDrop, MaxMetric, MaxSize, Metric, Recipe
from outrider_exporters.around import Caller
from outrider_exporters.deciding import decide, with_blame
from outrider_exporters.job import Job
from outrider_exporters.layers import LayerError
from outrider_exporters.packing import Built, choose_golden, environment, generated_rows, sample_rows
from outrider_exporters.passes import Stage
from outrider_exporters.passes.base import PassContext
from outrider_exporters.report import VariantReport
from outrider_runtimes.board import Board
from outrider_runtimes.tensors import Interface, TensorSpec

HOST = Board(machine="x86_64", features=frozenset(["avx2", "avx512_vnni"]), cpus=2, memory_bytes=0, python="3.11.9")
INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 4), axes="NC"),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 3), axes="NC"),),
)
BASELINE = Stage(name="baseline", metrics={"accuracy": 0.95}, parameters=10, macs=10)
FORMS = {"float32": "float32", "int8": "qdq-s8s8-per-channel", "u8s8": "qdq-u8s8-per-channel"}


def rows(count, seed=0):
    return {"x": np.random.default_rng(seed).random((count, 4), dtype=np.float32)}


def job(**options):
    data = options.pop(
        "data", Data(train=(rows(20, 1), np.zeros(20, np.int64)), calibration=rows(9, 2), test=(rows(30, 3), 1))
    )
    context = PassContext(interface=INTERFACE, example=rows(2, 4), data=data, seed=5)
    arguments = {
        "name": "a",
        "version": 1,
        "output": Path("a.outrider"),
        "recipe": Recipe(),
        "formats": ("onnx",),
        "targets": (),
        "gates": (),
        "signing_keys": (),
        "evaluate": lambda predict, test: {},
        "data": data,
        "caller": Caller(interface=INTERFACE, example=context.example),
        "context": context,
        "host": HOST,
    }
    return Job(**{**arguments, **options})


def variant(form, accuracy=0.95, *, ms=1.0, size=1000, metric="accuracy"):
    return VariantReport(
        name=f"onnx-{form}",
        format="onnx",
        precision="float32" if form == "float32" else "int8",
        scheme=FORMS[form],
        size_bytes=size,
        metrics={metric: accuracy},
        latency_host_ms_p50=ms,
        parity=0.01,
    )


def built(*variants, failed=MappingProxyType({})):
    slots = {v.name: "onnx-int8" if v.precision == "int8" else v.name for v in variants}
    return Built(reference=lambda x: x, files={}, variants=variants, slots=slots, failed=failed)


def names(variants):
    return [v.name for v in variants]


DROP = MaxDrop("accuracy", points=1.0)


def test_without_targets_everything_is_kept_and_slowness_is_said():
    decision = decide(job(), built(variant("float32"), variant("int8", ms=2.0)), BASELINE, ())
    assert names(decision.kept) == ["onnx-float32", "onnx-int8"]
    assert decision.kept[0].note == ""
    assert decision.kept[1].note.startswith("slower than float32 on the exporting host: 2.000 ms")
    assert (decision.passed_over, decision.choices, decision.missed) == ((), (), ())


def test_a_larger_file_is_said_to_be_larger_and_what_was_tried_is_kept_with_the_figures():
    decision = decide(job(), built(variant("float32", ms=0.01), variant("int8", ms=0.02, size=1600)), BASELINE, ())
    assert decision.kept[1].note.endswith("no smaller than float32: 1600 bytes, onnx-float32 1000")
    assert decision.worth.text.startswith("no quantized form beats float32: onnx-float32 takes 0.010 ms")
    assert decision.worth.tried["onnx-int8"]["size_bytes"] == 1600


def test_targets_choose_and_the_rest_is_told_with_reasons():
    files = built(
        variant("float32"), variant("int8", ms=0.5), variant("u8s8", ms=0.2), failed={"onnx-x": "could not be made: no"}
    )
    decision = decide(job(targets=("native",)), files, BASELINE, ())
    assert names(decision.kept) == ["onnx-float32", "onnx-u8s8"]
    assert names(decision.passed_over) == ["onnx-int8"]
    assert decision.dropped["onnx-int8"].startswith("native: onnx-u8s8 was preferred")
    assert decision.dropped["onnx-x"] == "could not be made: no"
    assert decision.kept[0].targets == {"native": "measured on the exporting host"}


def test_each_target_gets_its_own_and_unmeasured_ones_say_so():
    files = built(variant("float32"), variant("int8", ms=0.5), variant("u8s8", ms=0.2))
    decision = decide(job(targets=("native", "pi5")), files, BASELINE, ())
    assert names(decision.kept) == ["onnx-float32", "onnx-int8", "onnx-u8s8"]
    assert decision.kept[1].targets == {"pi5": "unmeasured"}
    assert decision.kept[2].targets == {"native": "measured on the exporting host"}


def test_a_form_that_misses_a_gate_gives_way_to_one_that_meets_it():
    files = built(variant("float32"), variant("int8", 0.95, ms=0.5), variant("u8s8", 0.5, ms=0.2))
    decision = decide(job(targets=("native",), gates=(DROP,)), files, BASELINE, ())
    assert names(decision.kept) == ["onnx-float32", "onnx-int8"]
    assert "missed max_drop" in decision.dropped["onnx-u8s8"]
    assert not decision.missed


def test_a_variant_none_of_whose_forms_meets_the_gates_fails_with_its_best_form():
    files = built(variant("float32"), variant("int8", 0.80), variant("u8s8", 0.70))
    decision = decide(job(targets=("native",), gates=(DROP, MaxSize(10**6))), files, BASELINE, ())
    assert [(r.variant, r.gate["type"]) for r in decision.missed] == [("onnx-int8", "max_drop")]
    assert names(decision.kept) == ["onnx-int8"]


def test_without_targets_one_missed_gate_is_enough():
    decision = decide(job(gates=(DROP,)), built(variant("float32"), variant("int8", 0.8)), BASELINE, ())
    assert [r.variant for r in decision.missed] == ["onnx-int8"]


def test_of_a_metric_of_which_lower_is_better_the_lower_is_chosen():
    files = built(
        variant("float32", 0.10, metric="error"),
        variant("int8", 0.30, metric="error"),
        variant("u8s8", 0.20, metric="error"),
    )
    base = dataclasses.replace(BASELINE, metrics={"error": 0.1})
    gates = (MaxMetric("error", at_most=0.05),)
    assert names(decide(job(targets=("native",), gates=gates), files, base, ()).kept) == ["onnx-float32", "onnx-u8s8"]


@pytest.mark.parametrize("gate", [DROP, MaxDrop(Metric("accuracy"), points=1.0)])
def test_the_layers_to_blame_are_told_where_quantization_is_at_fault(gate):
    decision = decide(job(gates=(gate, MaxSize(1))), built(variant("float32"), variant("int8", 0.8)), BASELINE, ())
    layers = {"onnx-int8": (LayerError(layer="head.1", operator="Gemm", error=0.4, added=0.3),)}
    told = {(r.variant, r.gate["type"]): r.layers for r in with_blame(decision, layers).results}
    assert told["onnx-int8", "max_drop"] == "quantization error grows most in head.1 (Gemm, +30.0%)"
    assert told["onnx-int8", "max_size"] == ""
    assert told["onnx-float32", "max_size"] == ""


# --- golden rows


def same_rows(few, many):
    return all((many["x"] == row).all(1).any() for row in few["x"])


def test_golden_rows_are_the_callers():
    given = rows(3, 9)
    golden = choose_golden(job(golden=given))
    assert golden.to_dict() == {"rows": 3, "from": "given", "trained_on": 0}
    np.testing.assert_array_equal(golden.inputs["x"], given["x"])


def test_training_rows_among_the_callers_are_counted():
    data = Data(train=(rows(20, 1), np.zeros(20, np.int64)), test=(rows(30, 3), 1))
    given = {"x": np.concatenate([data.train[0]["x"][:2], rows(2, 9)["x"]])}
    assert choose_golden(job(data=data, golden=given)).trained_on == 2


def test_golden_rows_are_the_tests_where_none_are_given():
    golden = choose_golden(job())
    assert (golden.origin, golden.rows) == ("test", 30)
    assert same_rows(golden.inputs, rows(30, 3))


def test_golden_rows_are_generated_where_the_test_is_the_users_own_kind():
    data = Data(train=(rows(20, 1), np.zeros(20, np.int64)), calibration=rows(9, 2), test=object())
    golden = choose_golden(job(data=data))
    assert (golden.origin, golden.rows, golden.trained_on) == ("generated", 64, 0)
    assert not same_rows({"x": golden.inputs["x"][2:]}, {"x": np.concatenate([rows(20, 1)["x"], rows(9, 2)["x"]])})
    assert golden.inputs["x"].max() <= rows(2, 4)["x"].max()
    np.testing.assert_array_equal(golden.inputs["x"], choose_golden(job(data=data)).inputs["x"])


def test_no_golden_row_is_a_training_row_though_the_example_or_the_test_has_some():
    test = {"x": np.concatenate([rows(20, 1)["x"], rows(3, 9)["x"]])}
    golden = choose_golden(job(data=Data(train=(rows(20, 1), np.zeros(20)), test=(test, 1))))
    assert golden.to_dict() == {"rows": 3, "from": "test", "trained_on": 0}
    assert same_rows(golden.inputs, rows(3, 9))
    for part in ((rows(2, 4), 1), object()):  # the example's rows are trained on, and all of the test's
        golden = choose_golden(job(data=Data(train=(rows(2, 4), np.zeros(2)), test=part)))
        assert golden.to_dict() == {"rows": 64, "from": "generated", "trained_on": 0}
        assert not (golden.inputs["x"][:, None] == rows(2, 4)["x"]).all(-1).any()


def test_generated_integers_stay_within_the_range():
    spec = TensorSpec(name="t", dtype="int64", shape=(None, 5), axes="NT", range=(0.0, 7.0))
    interface = dataclasses.replace(INTERFACE, inputs=(spec,))
    made = generated_rows({"t": np.ones((1, 5), np.int64)}, interface, 200, 0)["t"]
    assert made.dtype == np.int64
    assert set(np.unique(made)) == set(range(8))


def test_rows_to_measure_on_are_found_wherever_there_are_any():
    assert same_rows(sample_rows(job(), 4), rows(30, 3))
    assert same_rows(sample_rows(job(data=Data(calibration=rows(9, 2), test=object())), 4), rows(9, 2))
    assert len(sample_rows(job(data=Data(test=object())), 4)["x"]) == 4


def test_the_environment_names_the_kind_of_host_and_not_the_host():
    import platform

    found = environment(HOST)
    assert found["machine"] == "x86_64"
    assert found["cpu_features"] == ["avx2", "avx512_vnni"]
    assert "numpy" in found["tools"]
    assert platform.node() not in str(found)
