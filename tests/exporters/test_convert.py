from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters.convert import check_file, open_file, parity, predict_file
from outrider_exporters.convert.files import bind, engine_for, kept_when_good, open_session
from outrider_exporters.sources.module import interface_from_module, torch_predict
from outrider_runtimes.errors import (
    DtypeError,
    ExportError,
    InferenceError,
    ModelLoadError,
    NoEngine,
    NotFiniteError,
    ShapeError,
)
from support.converted import CONVERTERS, Converted, convert
from support.networks import Recurrent, Returns, RowByRow, SmallCnn, TokenClassifier, TwoSided, normal, seeded

pytestmark = pytest.mark.slow

FORMATS = sorted(CONVERTERS)
MAX_FLOAT_PARITY = 1e-4


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Converted:
    return convert(seeded(SmallCnn), {"image": normal(4, 1, 8, 8)}, ["logits"], tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Converted:
    example = {"tokens": np.random.default_rng(0).integers(0, 100, (1, 12))}
    return convert(seeded(TokenClassifier), example, ["scores"], tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def two_sided(tmp_path_factory) -> Converted:
    example = {"image": normal(2, 3, 8, 8), "vector": normal(2, 5)}
    return convert(seeded(TwoSided), example, ["map", "score", "choice"], tmp_path_factory.mktemp("two"))


def assert_same_answers(converted: Converted, model_format: str, inputs: dict[str, np.ndarray]) -> None:
    reference = torch_predict(converted.network, converted.interface)(inputs)
    outputs = predict_file(converted.files[model_format], converted.interface)(inputs)
    assert {n: (a.dtype, a.shape) for n, a in outputs.items()} == {n: (a.dtype, a.shape) for n, a in reference.items()}
    assert parity(reference, outputs) <= MAX_FLOAT_PARITY


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("model_format", FORMATS)
def test_a_cnn_answers_as_in_torch_for_any_n(cnn, model_format, rows):
    assert_same_answers(cnn, model_format, {"image": normal(rows, 1, 8, 8, seed=rows)})


@pytest.mark.parametrize("model_format", FORMATS)
def test_token_ids_stay_int64_for_the_caller(tokens, model_format):
    ids = np.random.default_rng(3).integers(0, 100, (3, 12))
    assert_same_answers(tokens, model_format, {"tokens": ids})
    with pytest.raises(DtypeError):
        predict_file(tokens.files[model_format], tokens.interface)({"tokens": ids.astype(np.int32)})


def test_token_ids_that_int32_cannot_hold_are_refused(tokens):
    with pytest.raises(InferenceError, match="beyond int32"):
        predict_file(tokens.files["tflite"], tokens.interface)({"tokens": np.full((1, 12), 2**40)})


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_several_inputs_and_outputs_by_name(two_sided, model_format):
    assert_same_answers(two_sided, model_format, {"vector": normal(3, 5, seed=4), "image": normal(3, 3, 8, 8, seed=5)})


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_a_recurrent_network_answers_as_in_torch(tmp_path, model_format):
    network, example = seeded(Recurrent), {"x": normal(2, 6, 8)}
    interface = interface_from_module(network, example, ["scores"], axes={"x": "NTC"})
    file = CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    inputs = {"x": normal(3, 6, 8, seed=2)}
    reference = torch_predict(network, interface)(inputs)
    assert parity(reference, predict_file(file, interface)(inputs)) <= MAX_FLOAT_PARITY


def test_files_differ_in_names_and_layout_and_the_interface_does_not(cnn, tokens):
    onnx, tflite = (cnn.files[name].binding.inputs[0] for name in FORMATS)
    assert onnx.file_name != tflite.file_name
    assert {onnx.name, tflite.name} == {"image"}
    assert (onnx.shape, onnx.permutation) == ((None, 1, 8, 8), ())
    assert (tflite.shape, tflite.permutation) == ((1, 8, 8, 1), (0, 2, 3, 1))
    assert [tokens.files[name].binding.inputs[0].dtype for name in FORMATS] == ["int64", "int32"]
    assert cnn.files["onnx"].scheme == cnn.files["onnx"].precision == "float32"


@pytest.mark.slow
def test_maps_are_channel_last_in_tflite(two_sided):
    by_name = {b.name: b for b in two_sided.files["tflite"].binding.outputs}
    assert (by_name["map"].shape, by_name["map"].permutation) == ((1, 8, 8, 4), (0, 2, 3, 1))
    assert by_name["choice"].dtype == "int32"


@pytest.mark.parametrize("model_format", FORMATS)
def test_no_path_of_this_machine_is_in_a_file(cnn, model_format):
    content = cnn.files[model_format].path.read_bytes()
    for trace in (__file__, str(Path.cwd()), str(Path(torch.__file__).parent), "stack_trace"):
        assert trace.encode() not in content


def test_converters_print_nothing(tmp_path, capfd):
    network, example = nn.Linear(4, 3), {"x": normal(1, 4)}
    interface = interface_from_module(network, example, ["y"])
    for name, to in CONVERTERS.items():
        predict_file(to(network, interface, example, tmp_path / name), interface)({"x": normal(2, 4)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_network_whose_n_cannot_be_free_gets_a_file_of_one_row(tmp_path):
    network, example = RowByRow(), {"x": normal(3, 4)}
    interface = interface_from_module(network, example, ["y"])
    file = CONVERTERS["onnx"](network, interface, example, tmp_path / "m.onnx")
    assert file.binding.inputs[0].shape == (1, 4)
    x = normal(5, 4, seed=6)
    assert parity(torch_predict(network, interface)({"x": x}), predict_file(file, interface)({"x": x})) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_a_network_without_a_batch_axis(tmp_path, model_format):
    network, example = Returns(lambda x: x.cumsum(0) * 2), {"x": normal(3, 4)}
    interface = interface_from_module(network, example, ["y"], axes={"x": ""})
    file = CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    x = normal(3, 4, seed=1)
    assert parity(torch_predict(network, interface)({"x": x}), predict_file(file, interface)({"x": x})) <= 1e-6


@pytest.mark.slow
def test_more_than_ten_inputs_keep_their_order(tmp_path):
    class Many(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(tensor * (position + 1) for position, tensor in enumerate(tensors))

    example = {f"in{i}": normal(1, 2, seed=i) for i in range(12)}
    network, outputs = Many(), [f"out{i}" for i in range(12)]
    interface = interface_from_module(network, example, outputs)
    for name, to in CONVERTERS.items():
        given = predict_file(to(network, interface, example, tmp_path / name), interface)(example)
        for i in range(12):
            np.testing.assert_allclose(given[f"out{i}"], example[f"in{i}"] * (i + 1), rtol=1e-6)


@pytest.mark.parametrize("model_format", FORMATS)
def test_conditions_on_values_are_refused_and_nothing_is_left(tmp_path, model_format, capfd):
    network, example = Returns(lambda x: x * 2 if x.sum() > 0 else x - 1), {"x": normal(1, 4)}
    interface = interface_from_module(network, example, ["y"])
    with pytest.raises(ExportError, match=f"(?i)Returns cannot be converted to {model_format}") as caught:
        CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    assert "torch.where" in caught.value.hint
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("model_format", FORMATS)
def test_a_network_that_draws_random_numbers_is_refused(tmp_path, model_format):
    network, example = Returns(lambda x: nn.functional.dropout(x, 0.5)), {"x": normal(1, 64)}
    interface = interface_from_module(Returns(lambda x: x), example, ["y"])
    with pytest.raises(ExportError):
        CONVERTERS[model_format](network, interface, example, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_format", FORMATS)
def test_a_failure_leaves_the_older_file(tmp_path, model_format):
    path = tmp_path / "m"
    path.write_bytes(b"older")
    network, example = nn.Linear(4, 3), {"x": normal(1, 4)}
    interface = interface_from_module(network, example, ["y"])
    with torch.no_grad():
        network.bias[0] = torch.nan
    with pytest.raises(ExportError, match="'bias' has NaN"):
        CONVERTERS[model_format](network, interface, example, path)
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("model_format", FORMATS)
def test_an_example_that_does_not_fit_is_an_input_error(tmp_path, cnn, model_format):
    with pytest.raises(ShapeError, match="'image'"):
        CONVERTERS[model_format](cnn.network, cnn.interface, {"image": normal(1, 1, 9, 8)}, tmp_path / "m")
    with pytest.raises(NotFiniteError):
        CONVERTERS[model_format](
            cnn.network, cnn.interface, {"image": np.full((1, 1, 8, 8), np.nan, np.float32)}, tmp_path / "m"
        )


@pytest.mark.parametrize("model_format", FORMATS)
def test_a_folder_that_is_not_there(tmp_path, cnn, model_format):
    with pytest.raises(ExportError, match=r"m\.x cannot be written: No such file"):
        CONVERTERS[model_format](cnn.network, cnn.interface, cnn.example, tmp_path / "none" / "m.x")


def test_check_file_finds_another_networks_file(cnn):
    other = torch_predict(seeded(SmallCnn, seed=9), cnn.interface)
    for file in cnn.files.values():
        check_file(file, cnn.interface, cnn.example)
        with pytest.raises(ExportError, match="answers differently from the network"):
            check_file(file, cnn.interface, cnn.example, other)


def test_check_file_finds_a_cut_file(tmp_path, cnn):
    for file in cnn.files.values():
        cut = tmp_path / file.path.name
        cut.write_bytes(file.path.read_bytes()[:-100])
        with pytest.raises(ModelLoadError):
            check_file(replace(file, path=cut), cnn.interface, cnn.example)


@pytest.mark.slow
def test_bind_finds_a_tensor_that_is_missing_or_reshaped(cnn, two_sided):
    session = open_session(cnn.files["tflite"].path, "tflite")
    with pytest.raises(ExportError, match="has 1 inputs, the interface 2"):
        bind(two_sided.interface, session, channel_last=True)
    with pytest.raises(ExportError, match=r"'image' became \[1, 8, 8, 1\] in the file, expected \[None, 1, 8, 8\]"):
        bind(cnn.interface, session, channel_last=False)


def test_an_open_file_can_be_closed(cnn):
    session = open_file(cnn.files["onnx"], cnn.interface)
    session.run(cnn.example)
    session.close()
    with pytest.raises(InferenceError, match="closed"):
        session.run(cnn.example)


def test_a_format_that_nothing_runs():
    with pytest.raises(NoEngine, match="'gguf'"):
        engine_for("gguf")


def test_parity_is_relative_to_the_range():
    wanted = {"y": np.float32([[0.0, 10.0]]), "z": np.float32([1.0])}
    assert parity(wanted, wanted) == 0.0
    assert parity(wanted, {"y": np.float32([[0.5, 10.0]]), "z": np.float32([1.0])}) == pytest.approx(0.05)
    assert parity(wanted, {"y": np.float32([[0.0, 10.0]]), "z": np.float32([1.2])}) == pytest.approx(0.2)
    assert parity({"y": np.zeros((1, 2), np.float32)}, {"y": np.float32([[0.0, 0.25]])}) == 0.25


def test_parity_of_classes_is_the_share_that_differs():
    assert parity({"y": np.int64([0, 1, 2, 9])}, {"y": np.int64([0, 1, 2, 3])}) == 0.25


def test_parity_of_what_is_not_finite():
    nan, inf, one = np.float32([np.nan, 1]), np.float32([np.inf, 1]), np.float32([1, 1])
    assert parity({"y": nan}, {"y": nan}) == 0.0
    assert parity({"y": inf}, {"y": inf}) == 0.0
    assert parity({"y": one}, {"y": nan}) == np.inf
    assert parity({"y": nan}, {"y": one}) == np.inf
    assert parity({"y": inf}, {"y": one}) == np.inf
    assert parity({"y": np.zeros((0, 2), np.float32)}, {"y": np.zeros((0, 2), np.float32)}) == 0.0


def test_parity_needs_equal_names_and_shapes():
    with pytest.raises(ExportError, match="were to be compared"):
        parity({"y": normal(2)}, {"z": normal(2)})
    with pytest.raises(ExportError, match="'y' has shape"):
        parity({"y": normal(2)}, {"y": normal(3)})


def test_kept_when_good_keeps_all_or_nothing(tmp_path):
    path = tmp_path / "m"
    with kept_when_good(path) as part:
        part.write_bytes(b"new")
        assert not path.exists()
    with pytest.raises(RuntimeError), kept_when_good(path) as part:
        part.write_bytes(b"broken")
        raise RuntimeError
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
