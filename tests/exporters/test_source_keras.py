from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from outrider.bundle import open_bundle
from outrider_exporters import Data, Prune, Quantize, Recipe, export
from outrider_runtimes.errors import ConfigError, ExportError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    from support import keras_models

    return keras_models


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 12, 12, 3), dtype=np.float32)


def mixed(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"tokens": rng.integers(0, 7, (rows, 5)), "a": rng.random((rows, 4), dtype=np.float32)}


def operators(path) -> list[str]:
    """The operators of a TFLite file, in order."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = tfl_flatbuffer_utils.read_model(str(path))
    return [names[model.operatorCodes[o.opcodeIndex].builtinCode] for o in model.subgraphs[0].operators]


def test_an_image_model_becomes_every_variant_without_a_transpose_at_its_edges(models, tmp_path):
    model, x = models.image_classifier(), images(64)
    report = export(
        model,
        example={"picture": x[:1]},
        outputs=["share"],
        data=Data(calibration={"picture": images(32, seed=1)}, test=({"picture": x}, np.zeros(64, np.int64))),
        evaluate=lambda predict, test: {"mean": float(predict(test[0])["share"].max(-1).mean())},
        recipe=Recipe([Quantize("int8")]),
        output=tmp_path / "k.outrider",
    )
    assert [v.name for v in report.variants] == ["onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8"]
    assert all(v.parity < 1e-5 for v in report.variants if v.precision == "float32")
    with open_bundle(report.bundle) as bundle:
        interface = bundle.manifest.interface
        for variant in bundle.manifest.variants:
            assert [b.permutation for b in (*variant.binding.inputs, *variant.binding.outputs)] == [(), ()]
        with (tmp_path / "m.tflite").open("wb") as file:
            bundle.copy_to("models/tflite-float32.tflite", file)
    assert (interface.inputs[0].name, interface.inputs[0].axes) == ("picture", "NHWC")
    assert interface.outputs[0].name == "share"
    assert "TRANSPOSE" not in operators(tmp_path / "m.tflite")


def test_the_reference_is_keras_own_answer_and_the_model_is_left_alone(models):
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    model, x = models.image_classifier(), images(5)
    wanted = model.predict(x, verbose=0)
    before = [w.numpy().copy() for w in model.weights]
    model.train()
    predict = torch_predict(model, interface_from_module(model, {"x": x}, ["y"]))
    np.testing.assert_allclose(predict({"x": x})["y"], wanted, atol=1e-6)
    assert model.training
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.mark.parametrize("as_dict", [True, False])
def test_several_inputs_go_by_the_names_of_keras_input_and_outputs_by_key(models, as_dict):
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    model, inputs = models.two_inputs_two_outputs(as_dict=as_dict), mixed(4)
    names = ["score", "class"] if as_dict else ["class", "score"]
    interface = interface_from_module(model, inputs, names)
    assert [(s.name, s.dtype, s.axes) for s in interface.inputs] == [("tokens", "int64", "NT"), ("a", "float32", "NC")]
    given = torch_predict(model, interface)(inputs)
    wanted = model.predict(inputs if as_dict else [inputs["a"], inputs["tokens"]], verbose=0)
    wanted = wanted if as_dict else dict(zip(["class", "score"], wanted, strict=True))
    for name in names:
        np.testing.assert_allclose(given[name], wanted[name], atol=1e-6)


def test_other_names_than_keras_go_in_order(models):
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    model, inputs = models.two_inputs_two_outputs(as_dict=False), mixed(3)
    renamed = {"numbers": inputs["a"], "words": inputs["tokens"]}
    given = torch_predict(model, interface_from_module(model, renamed, ["c", "s"]))(renamed)
    wanted = model.predict([inputs["a"], inputs["tokens"]], verbose=0)
    np.testing.assert_allclose(given["c"], wanted[0], atol=1e-6)
    with pytest.raises(ExportError, match=r"has inputs \['a', 'tokens'\], the example \['a'\]"):
        interface_from_module(model, {"a": inputs["a"]}, ["c", "s"])


def test_a_registered_subclass_gets_its_inputs_by_parameter_name(models):
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    model = models.Subclassed()
    inputs = {"second": np.ones((2, 3), np.float32), "first": np.zeros((2, 3), np.float32)}
    model(**inputs)
    given = torch_predict(model, interface_from_module(model, inputs, ["y"]))(inputs)["y"]
    np.testing.assert_allclose(given, -1.0)


def test_a_model_that_keras_cannot_copy_says_what_to_do(models):
    from outrider_exporters.sources.module import evaluation_copy

    model = models.Unregistered(2)
    model(np.ones((1, 3), np.float32))
    with pytest.raises(ExportError, match="Unregistered cannot be copied") as caught:
        evaluation_copy(model)
    assert "register_keras_serializable" in caught.value.hint


def test_the_copy_trains_as_keras_does_and_only_what_is_trainable(models):
    import torch

    from outrider_exporters.sources.module import as_tensors, trainable_copy

    model = models.image_classifier()
    model.layers[0].trainable = False
    network = trainable_copy(model, ["x"], ["y"])
    x = as_tensors([images(4)])
    assert torch.equal(network(*x)[0], network(*x)[0])
    network.train()
    first, second = network(*x)[0], network(*x)[0]
    assert not torch.equal(first, second)  # dropout
    first.log().sum().backward()
    moved = [w.path.rpartition("/")[2] for w in network.module.weights if w.value.grad is not None]
    assert moved == ["gamma", "beta", "kernel", "bias", "kernel", "bias"]


def test_pruning_a_keras_model_is_refused_at_once(models, tmp_path):
    x = {"x": images(4)}
    with pytest.raises(ConfigError, match=r"passes\[0\]: prune slices torch layers") as caught:
        export(
            models.image_classifier(),
            example=x,
            outputs=["y"],
            data=Data(test=x),
            evaluate=lambda predict, test: {"a": 1.0},
            recipe=Recipe([Prune(ratio=0.5)]),
            output=tmp_path / "k.outrider",
        )
    assert "Distill" in caught.value.hint


def test_nan_in_a_keras_weight_is_found(models):
    from outrider_exporters.sources.module import evaluation_copy

    model = models.image_classifier()
    model.layers[4].bias.assign(np.full(16, np.nan))
    with pytest.raises(ExportError, match=r"conv2d_\d+/bias' has NaN"):
        evaluation_copy(model)


def test_another_backend_is_refused_with_what_to_set(tmp_path):
    """In a process of its own: the backend is chosen once."""
    code = (
        "import keras\n"
        "from outrider_exporters.sources.module import evaluation_copy\n"
        "from outrider_runtimes.errors import ExportError\n"
        "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
        "try:\n"
        "    evaluation_copy(model)\n"
        "except ExportError as error:\n"
        "    print(error, '|', error.hint)\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert "is on the jax backend, expected torch | " in done.stdout, done.stderr
    assert "KERAS_BACKEND=torch" in done.stdout
