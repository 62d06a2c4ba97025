"""Files of networks with free axes: ONNX for any size, TFLite with a signature a size; float and smaller ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
import pytest
from torch import nn

from outrider_exporters.convert import ModelFile, parity, predict_file
from outrider_exporters.convert.files import bind, check_file, open_session, parity_at_sizes
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.convert.strip import stripped
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.passes import Quantize
from outrider_exporters.rows import example_rows, resize_axes
from outrider_exporters.sources.module import describe_module, torch_predict
from outrider_runtimes.engines._interpreter import SignatureSession
from outrider_runtimes.errors import ExportError, ShapeError
from outrider_runtimes.tensors import Binding
from support.networks import normal
from support.variable import Cells, Encoder, Resizer

pytestmark = pytest.mark.slow

MAX_FLOAT_PARITY, MAX_INT8_PARITY = 1e-4, 0.05
WIDTH = 128  # of the encoder: weights are most of its files
LENGTHS = (4, 8, 16)


@dataclass(frozen=True)
class Made:
    network: nn.Module
    example: dict[str, np.ndarray]
    interface: object
    sizes: tuple[dict[str, int], ...]
    onnx: ModelFile
    tflite: ModelFile

    def rows(self, sizes):
        """Three rows of inputs at these sizes."""
        return resize_axes(example_rows(self.example, self.interface, 3), self.interface.inputs, sizes)

    def error(self, file, inputs):
        """The file's difference from torch on these inputs."""
        reference = torch_predict(self.network, self.interface)
        return parity(reference(inputs), predict_file(file, self.interface)(inputs))


def made(network, example, outputs, folder, *, shapes, **options):
    network = network.eval()
    found = describe_module(network, example, outputs, **options)
    to = {"onnx": partial(to_onnx, sizes=found.sizes), "tflite": partial(to_tflite, sizes=shapes)}
    files = {kind: convert(network, found.interface, example, folder / f"m.{kind}") for kind, convert in to.items()}
    return Made(network, example, found.interface, found.sizes, **files)


def ids(length, rows=2):
    return {"tokens": np.random.default_rng(length).integers(0, 20, (rows, length))}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return made(
        Encoder(WIDTH),
        ids(8),
        ["each", "halves", "whole"],
        tmp_path_factory.mktemp("encoder"),
        dynamic_axes={"tokens": "T"},
        shapes=[{"T": length} for length in LENGTHS],
    )


@pytest.fixture(scope="module")
def single(encoder):
    """The encoder's TFLite file with one signature."""
    path = encoder.tflite.path.with_name("single.tflite")
    return to_tflite(encoder.network, encoder.interface, encoder.example, path, sizes=[{"T": 8}])


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    state = np.zeros((2, 1, 8), np.float32)
    return made(
        Cells(),
        {"x": normal(2, 6, 4), "h": state, "c": state},
        ["scores", "h_next", "c_next"],
        tmp_path_factory.mktemp("cells"),
        axes={"x": "NTC"},
        dynamic_axes={"x": "T"},
        state={"h": "h_next", "c": "c_next"},
        shapes=[{"T": 1}, {"T": 3}],
    )


@pytest.fixture(scope="module")
def resizer(tmp_path_factory):
    return made(
        Resizer(),
        {"image": normal(1, 3, 8, 8)},
        ["map"],
        tmp_path_factory.mktemp("resizer"),
        axes={"map": "NCHW"},
        dynamic_axes={"image": "HW"},
        shapes=[{"H": 8, "W": 8}, {"H": 4, "W": 12}],
    )


def dims(path):
    graph = onnx.load(str(path)).graph
    return [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]


def test_an_onnx_file_names_its_free_axes(encoder, cells):
    tokens, each, halves, whole = dims(encoder.onnx.path)
    assert tokens == ["N", "T"] and each == ["N", "T", 20] and whole == ["N", WIDTH]
    assert isinstance(halves[1], str)
    series, *_ = dims(cells.onnx.path)
    assert series == ["N", "T", 4]
    assert [b.shape for b in encoder.onnx.binding.outputs] == [(None, None, 20), (None, None), (None, WIDTH)]


@pytest.mark.parametrize("length", [1, 2, 5, 8, 33, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_onnx_file_takes_any_length(encoder, length, rows):
    assert encoder.error(encoder.onnx, ids(length, rows)) <= MAX_FLOAT_PARITY


@pytest.mark.parametrize("length", [1, 2, 6, 25])
def test_a_recurrent_onnx_file_takes_any_length(cells, length):
    state = {"h": normal(3, 1, 8, seed=1), "c": normal(3, 1, 8, seed=2)}
    assert cells.error(cells.onnx, {"x": normal(3, length, 4, seed=length), **state}) <= MAX_FLOAT_PARITY


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (20, 4)])
def test_an_onnx_file_takes_images_of_any_size(resizer, size):
    assert resizer.error(resizer.onnx, {"image": normal(2, 3, *size)}) <= MAX_FLOAT_PARITY


@pytest.mark.parametrize("scheme", ["dynamic", "weight-only"])
def test_smaller_onnx_files_take_any_length(encoder, tmp_path, scheme):
    path = tmp_path / "q.onnx"
    file = quantize_file(encoder.onnx, [encoder.example], encoder.interface, path, rule=Quantize(scheme))
    assert file.sizes == encoder.sizes
    for length in (2, 5, 8, 33):
        assert encoder.error(file, ids(length, rows=8)) <= MAX_INT8_PARITY
    sizes = path.stat().st_size, encoder.onnx.path.stat().st_size
    assert sizes[0] < 0.5 * sizes[1], sizes


@pytest.mark.parametrize("network", ["encoder", "cells", "resizer"])
def test_a_tflite_file_has_a_signature_a_size(network, request):
    one = request.getfixturevalue(network)
    session = open_session(one.tflite.path, "tflite")
    assert isinstance(session, SignatureSession)
    assert len(one.tflite.binding.signatures) == len(one.tflite.sizes)
    for sizes in one.tflite.sizes:
        assert one.error(one.tflite, one.rows(sizes)) <= MAX_FLOAT_PARITY


def test_the_binding_says_which_shapes_in_the_files_order(encoder, resizer):
    assert encoder.tflite.binding.signatures == tuple({"tokens": (1, length)} for length in LENGTHS)
    assert encoder.tflite.binding.inputs[0].shape == (1, None)
    assert encoder.tflite.binding.inputs[0].dtype == "int32"
    assert resizer.tflite.binding.signatures == ({"image": (1, 8, 8, 3)}, {"image": (1, 4, 12, 3)})
    assert resizer.tflite.binding.inputs[0].permutation == (0, 2, 3, 1)
    stored = encoder.tflite.binding.to_dict()
    assert Binding.from_dict(stored, encoder.interface) == encoder.tflite.binding
    assert encoder.onnx.binding.signatures == ()


def test_a_size_without_a_signature_is_never_padded(encoder, resizer):
    with pytest.raises(ShapeError, match=r"'tokens' \[N, 5\]") as caught:
        predict_file(encoder.tflite, encoder.interface)(ids(5))
    assert "[N, 4]; 'tokens' [N, 8]; 'tokens' [N, 16]" in caught.value.hint
    with pytest.raises(ShapeError, match=r"'image' \[N, 3, 4, 8\]") as caught:
        predict_file(resizer.tflite, resizer.interface)({"image": normal(1, 3, 4, 8)})
    assert "[N, 3, 8, 8]; 'image' [N, 3, 4, 12]" in caught.value.hint


def test_the_signatures_share_their_weights(encoder, single):
    assert encoder.tflite.path.stat().st_size < 1.2 * single.path.stat().st_size


def test_int8_signatures_share_their_weights(encoder, single, tmp_path):
    """Without the names that only people read, as they go into bundles."""
    light = []
    for name, file in (("several", encoder.tflite), ("single", single)):
        calibration, path = [encoder.rows(file.sizes[0])], tmp_path / f"{name}.tflite"
        small = quantize_file(file, calibration, encoder.interface, path, rule=Quantize("dynamic"))
        light.append(stripped(small, encoder.interface, encoder.example, tmp_path / f"{name}-light.tflite"))
        for sizes in light[-1].sizes:
            assert encoder.error(light[-1], encoder.rows(sizes)) <= MAX_INT8_PARITY
    several, alone = (file.path.stat().st_size for file in light)
    assert light[0].path.name == "several-light.tflite"
    assert several < 1.2 * alone, (several, alone)
    with pytest.raises(ShapeError, match="made for some sizes only"):
        predict_file(light[1], encoder.interface)(ids(4))


@pytest.mark.parametrize("scheme", ["weight-only", "float16"])
def test_other_forms_keep_their_signatures(cells, tmp_path, scheme):
    rule, calibration = Quantize(scheme), [cells.rows({"T": 3})]
    file = quantize_file(cells.tflite, calibration, cells.interface, tmp_path / "q.tflite", rule=rule)
    assert max(cells.error(file, cells.rows(sizes)) for sizes in file.sizes) <= MAX_INT8_PARITY


def test_static_int8_of_several_signatures_is_a_known_gap(encoder, tmp_path):
    with pytest.raises(ExportError, match="the other signatures have no ranges") as caught:
        quantize_file(encoder.tflite, [encoder.example], encoder.interface, tmp_path / "q.tflite")
    assert 'Quantize("dynamic")' in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_tflite_without_sizes_is_refused(encoder, tmp_path):
    with pytest.raises(ExportError, match="TFLite has fixed sizes, and T is free") as caught:
        to_tflite(encoder.network, encoder.interface, encoder.example, tmp_path / "m.tflite")
    assert "shapes=" in caught.value.hint


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_the_state_is_fed_back_when_a_file_is_checked(cells, kind):
    """A file that is right in the first step and forgets the state is not the network."""
    file, predict = getattr(cells, kind), torch_predict(cells.network, cells.interface)
    check_file(file, cells.interface, cells.example, predict)

    def remembers(inputs):
        """As the network where the state is zero, as it is in the example."""
        outputs = predict(inputs)
        return {**outputs, "scores": outputs["scores"] + np.abs(inputs["h"]).sum()}

    with pytest.raises(ExportError, match="answers differently from the network"):
        check_file(file, cells.interface, cells.example, remembers)


def test_a_file_is_checked_at_other_sizes(encoder):
    """A reference that differs at one length only is found."""
    predict = torch_predict(encoder.network, encoder.interface)

    def other(inputs):
        return {name: array + (inputs["tokens"].shape[1] == 16) for name, array in predict(inputs).items()}

    for file in (encoder.onnx, encoder.tflite):
        with pytest.raises(ExportError, match="at T = 16"):
            check_file(file, encoder.interface, encoder.example, other)
        ours = predict_file(file, encoder.interface)
        assert parity_at_sizes(file, encoder.interface, other, ours, encoder.example) > 0.1
        assert parity_at_sizes(file, encoder.interface, predict, ours, encoder.example) <= MAX_FLOAT_PARITY


def test_a_length_that_the_converter_fixed_is_refused(encoder, single):
    with pytest.raises(ExportError, match="the converter fixed T of 'tokens' to 8"):
        bind(encoder.interface, open_session(single.path, "tflite"), channel_last=True)
    claims_more = replace(single, binding=replace(single.binding, signatures=()), sizes=({"T": 4},))
    with pytest.raises(ExportError, match="the converted tflite file cannot take T = 4") as caught:
        check_file(claims_more, encoder.interface, encoder.example)
    assert "x.shape" in caught.value.hint
