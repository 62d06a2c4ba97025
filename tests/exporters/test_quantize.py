from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters.convert import parity, predict_file
from outrider_exporters.convert.quantize import (
    is_quantized_onnx,
    is_quantized_tflite,
    quantize_file,
    quantized_share_onnx,
    quantized_share_tflite,
)
from outrider_exporters.sources.module import interface_from_module, torch_predict
from outrider_runtimes.errors import DtypeError, ExportError, InputError, NotFiniteError, ShapeError, UnknownTensor
from support.converted import CONVERTERS, Converted, convert
from support.networks import Recurrent, TokenClassifier, TwoSided, digits, normal, seeded, trained_cnn

pytestmark = pytest.mark.slow

FORMATS = ["onnx", "tflite"]
TRAIN_ROWS, CALIBRATION_ROWS = 1200, 200


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Converted:
    images, _ = digits()
    return convert(trained_cnn(TRAIN_ROWS), {"image": images[:2]}, ["logits"], tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, np.ndarray]]:
    images, _ = digits()
    return [{"image": images[i : i + 1]} for i in range(CALIBRATION_ROWS)]


@pytest.fixture(scope="module")
def quantized(cnn, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    return {name: quantize_file(cnn.files[name], calibration, cnn.interface, folder / f"q.{name}") for name in FORMATS}


@pytest.mark.parametrize("model_format", FORMATS)
def test_int8_decides_as_float32(cnn, quantized, model_format):
    images, targets = digits()
    inputs, targets = {"image": images[TRAIN_ROWS:]}, targets[TRAIN_ROWS:]
    exact = predict_file(cnn.files[model_format], cnn.interface)(inputs)["logits"].argmax(-1)
    rounded = predict_file(quantized[model_format], cnn.interface)(inputs)["logits"].argmax(-1)
    assert (exact == targets).mean() > 0.9  # else agreement would say little
    assert (exact == rounded).mean() >= 0.95


def test_bindings_say_what_the_files_take(cnn, quantized):
    image, logits = quantized["tflite"].binding.inputs[0], quantized["tflite"].binding.outputs[0]
    assert (image.dtype, image.shape, image.permutation) == ("int8", (1, 8, 8, 1), (0, 2, 3, 1))
    assert image.scale == pytest.approx(1 / 255, rel=1e-3)  # the digits are within 0 and 1
    assert image.zero_point == -128
    assert logits.dtype == "int8"
    assert logits.scale is not None
    assert quantized["onnx"].binding == cnn.files["onnx"].binding  # float in and out, N free
    assert {file.precision for file in quantized.values()} == {"int8"}
    assert [quantized[name].scheme for name in FORMATS] == ["qdq-s8s8-per-channel", "static-int8-per-channel"]


def test_most_weights_are_in_8_bits(cnn, quantized):
    assert quantized_share_onnx(quantized["onnx"].path) > 0.95
    assert quantized_share_tflite(quantized["tflite"].path) > 0.95
    assert quantized_share_onnx(cnn.files["onnx"].path) == quantized_share_tflite(cnn.files["tflite"].path) == 0.0
    assert is_quantized_onnx(quantized["onnx"].path)
    assert is_quantized_tflite(quantized["tflite"].path)
    assert not is_quantized_onnx(cnn.files["onnx"].path)
    assert not is_quantized_tflite(cnn.files["tflite"].path)


def test_values_beyond_the_calibrated_range_are_clipped(cnn, quantized):
    bright = {"image": np.full((1, 1, 8, 8), 1e9, np.float32)}
    full = {"image": np.full((1, 1, 8, 8), 1.0, np.float32)}
    for file in quantized.values():
        predict = predict_file(file, cnn.interface)
        np.testing.assert_allclose(predict(bright)["logits"], predict(full)["logits"], rtol=1e-5)


@pytest.mark.parametrize("model_format", FORMATS)
def test_the_same_rows_give_the_same_file_in_whatever_portions(cnn, calibration, quantized, tmp_path, model_format):
    images, _ = digits()
    portions = [{"image": images[:150]}, {"image": images[150:CALIBRATION_ROWS]}]
    again = quantize_file(cnn.files[model_format], portions, cnn.interface, tmp_path / "q")
    assert again.path.read_bytes() == quantized[model_format].path.read_bytes()


@pytest.mark.parametrize("model_format", FORMATS)
def test_a_quantized_file_is_not_quantized_again(cnn, calibration, quantized, tmp_path, model_format):
    for disguise in ("int8", "float32"):
        source = replace(quantized[model_format], precision=disguise, binding=cnn.files[model_format].binding)
        with pytest.raises(ExportError, match="is quantized already") as caught:
            quantize_file(source, calibration[:2], cnn.interface, tmp_path / "q")
        assert "package" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ExportError, "no calibration rows"),
        (
            [{"image": normal(1, 1, 8, 8)}, {"image": normal(1, 1, 8, 9)}],
            ShapeError,
            "calibration row 1: input 'image'",
        ),
        ([{"image": normal(1, 1, 8, 8).astype(np.float64)}], DtypeError, "calibration row 0"),
        ([{"picture": normal(1, 1, 8, 8)}], UnknownTensor, "calibration row 0: input 'image' is missing"),
        ([{"image": np.full((1, 1, 8, 8), np.nan, np.float32)}], NotFiniteError, "calibration row 0"),
        ([{"image": normal(0, 1, 8, 8)}], InputError, "calibration row 0 has N = 0"),
    ],
)
@pytest.mark.parametrize("model_format", FORMATS)
def test_calibration_rows_are_checked(cnn, tmp_path, model_format, rows, error, message):
    with pytest.raises(error, match=message):
        quantize_file(cnn.files[model_format], rows, cnn.interface, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_a_network_without_weights_is_refused(tmp_path, model_format):
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * 2

    network, example = Plain(), {"x": normal(1, 4)}
    interface = interface_from_module(network, example, ["y"])
    file = CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    with pytest.raises(ExportError, match=r"quantized 0\.0% of the weights"):
        quantize_file(file, [example], interface, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_recurrent_weights_that_onnx_runtime_leaves_in_float_are_refused(tmp_path):
    network, example = seeded(Recurrent), {"x": normal(2, 6, 8)}
    interface = interface_from_module(network, example, ["scores"])
    file = CONVERTERS["onnx"](network, interface, example, tmp_path / "m")
    with pytest.raises(ExportError, match="at least 5% expected"):
        quantize_file(file, [example], interface, tmp_path / "q")


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_token_ids_and_embedding_tables(tmp_path, model_format):
    ids = np.random.default_rng(0).integers(0, 100, (64, 12))
    network, example = seeded(TokenClassifier), {"tokens": ids}
    interface = interface_from_module(network, example, ["scores"])
    file = CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    small = quantize_file(file, [example], interface, tmp_path / "q")
    assert small.binding.inputs[0].scale is None
    assert parity(torch_predict(network, interface)(example), predict_file(small, interface)(example)) < 0.03
    share = {"onnx": quantized_share_onnx, "tflite": quantized_share_tflite}[model_format](small.path)
    assert share > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_several_inputs_and_outputs(tmp_path, model_format, capfd):
    example = {"image": normal(32, 3, 8, 8), "vector": normal(32, 5)}
    network = seeded(TwoSided)
    interface = interface_from_module(network, example, ["map", "score"])
    file = CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    small = quantize_file(file, [example], interface, tmp_path / "q")
    assert parity(torch_predict(network, interface)(example), predict_file(small, interface)(example)) < 0.1
    assert capfd.readouterr() == ("", "")
