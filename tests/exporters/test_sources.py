from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters.sources.module import evaluation_copy, interface_from_module, torch_predict
from outrider_runtimes.errors import ExportError, InputError
from support.exporters import state_of
from support.networks import Returns, SmallCnn, TokenClassifier, TwoSided, normal, seeded

pytestmark = pytest.mark.slow


def test_a_cnn_takes_and_gives_n():
    network = seeded(SmallCnn)
    interface = interface_from_module(
        network,
        {"image": normal(1, 1, 8, 8)},
        ["logits"],
        labels=[str(digit) for digit in range(10)],
        ranges={"image": (0, 1)},
        meanings={"image": "brightness, 1.0 is white"},
    )
    image, logits = interface.inputs[0], interface.outputs[0]
    assert (image.name, image.dtype, image.shape, image.axes) == ("image", "float32", (None, 1, 8, 8), "NCHW")
    assert (image.range, image.meaning) == ((0.0, 1.0), "brightness, 1.0 is white")
    assert (logits.name, logits.dtype, logits.shape, logits.axes) == ("logits", "float32", (None, 10), "NC")
    assert interface.labels[9] == "9"


def test_the_network_is_left_as_it_was():
    network = seeded(SmallCnn).train()
    before = state_of(network)
    interface = interface_from_module(network, {"image": normal(4, 1, 8, 8)}, ["logits"])
    torch_predict(network, interface)({"image": normal(4, 1, 8, 8)})
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_reference_is_the_evaluation_mode_and_a_snapshot():
    network = seeded(SmallCnn).train()
    x = normal(5, 1, 8, 8)
    predict = torch_predict(network, interface_from_module(network, {"image": x}, ["logits"]))
    first = predict({"image": x})["logits"]
    with torch.no_grad():
        network.head[2].weight.zero_()
    np.testing.assert_array_equal(first, predict({"image": x})["logits"])
    np.testing.assert_allclose(
        first, np.concatenate([predict({"image": x[i : i + 1]})["logits"] for i in range(5)]), atol=1e-5
    )


def test_many_rows_are_answered_in_chunks():
    network = seeded(SmallCnn)
    x = normal(600, 1, 8, 8)
    predict = torch_predict(network, interface_from_module(network, {"image": x}, ["logits"]))
    whole = predict({"image": x})["logits"]
    assert whole.shape == (600, 10)
    np.testing.assert_allclose(whole[590:], predict({"image": x[590:]})["logits"], atol=1e-5)
    assert predict({"image": x[:0]})["logits"].shape == (0, 10)


def test_inputs_go_by_name_where_forward_knows_them():
    example = {"image": normal(2, 3, 8, 8), "vector": normal(2, 5)}  # forward has them the other way round
    network = seeded(TwoSided)
    interface = interface_from_module(network, example, ["map", "score", "choice"])
    assert [spec.name for spec in interface.inputs] == ["image", "vector"]
    assert [(s.name, s.dtype, s.shape) for s in interface.outputs] == [
        ("map", "float32", (None, 4, 8, 8)),
        ("score", "float32", (None,)),
        ("choice", "int64", (None,)),
    ]
    assert set(torch_predict(network, interface)(example)) == {"map", "score", "choice"}


def test_inputs_go_in_order_where_forward_has_other_names():
    network = seeded(TwoSided)
    example = {"numbers": normal(2, 5), "picture": normal(2, 3, 8, 8)}
    interface = interface_from_module(network, example, ["score"])
    np.testing.assert_array_equal(
        torch_predict(network, interface)(example)["score"],
        torch_predict(
            network,
            interface_from_module(network, {"vector": example["numbers"], "image": example["picture"]}, ["score"]),
        )({"vector": example["numbers"], "image": example["picture"]})["score"],
    )


def test_integer_inputs_are_tokens():
    interface = interface_from_module(seeded(TokenClassifier), {"tokens": np.ones((1, 12), np.int64)}, ["scores"])
    assert (interface.inputs[0].dtype, interface.inputs[0].axes, interface.inputs[0].shape) == (
        "int64",
        "NT",
        (None, 12),
    )


def test_axes_can_be_named_and_a_batch_refused():
    network = Returns(lambda x: (x.sum(), x))
    interface = interface_from_module(network, {"x": normal(3, 4)}, ["total", "same"], axes={"x": ""})
    assert [(s.axes, s.shape) for s in (*interface.inputs, *interface.outputs)] == [
        ("", (3, 4)),
        ("", ()),
        ("", (3, 4)),
    ]
    named = interface_from_module(network, {"x": normal(3, 4, 5)}, ["total", "same"], axes={"x": "NTC", "same": "NTC"})
    assert [s.axes for s in (*named.inputs, *named.outputs)] == ["NTC", "", "NTC"]


def test_nested_tuples_are_flattened():
    interface = interface_from_module(Returns(lambda x: (x, (x + 1, [x + 2]))), {"x": normal(2, 4)}, ["a", "b", "c"])
    assert [spec.name for spec in interface.outputs] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("function", "outputs", "message"),
    [
        (lambda x: (x, x), ["one"], "returns 2 tensors, 1 outputs are named"),
        (lambda x: {"a": x}, ["b"], r"returns \['a'\], not 'b'"),
        (lambda x: 3.0, ["y"], "'y' is a float, not a tensor"),
        (lambda x: x.bfloat16(), ["y"], "'y' is bfloat16"),
        (lambda x: x.t(), ["y"], "only the first axis may follow N"),
        (lambda x: x.reshape(2, -1) @ torch.ones(3, 1), ["y"], r"failed on inputs of float32 \[2, 4\]"),
        (lambda x: x, [], "expected a list of names"),
        (lambda x: x, "logits", "expected a list of names"),
        (lambda x: (x, x), ["y", "y"], "distinct"),
    ],
)
def test_what_a_network_returns_must_fit(function, outputs, message):
    with pytest.raises(ExportError, match=message):
        interface_from_module(Returns(function), {"x": normal(2, 4)}, outputs)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({}, "example is empty"),
        ({"x": [1.0]}, "'x' is a list"),
        ({"x": np.float32([[np.nan, 1, 2, 3]])}, "'x' has NaN"),
        ({"x": normal(0, 4)}, "'x' has no rows"),
        ({"x": normal(2, 4), "z": normal(3, 4)}, "different numbers of rows"),
        ({"x": np.array([["a"]])}, "has dtype <U1"),
        ({"x": np.ones((2, 4), np.complex64)}, "has dtype complex64"),
    ],
)
def test_an_example_must_be_arrays(example, message):
    with pytest.raises(ExportError, match=message):
        interface_from_module(Returns(lambda x: x), example, ["y"])


def test_options_name_known_tensors():
    with pytest.raises(ExportError, match="no tensor 'z'"):
        interface_from_module(Returns(lambda x: x), {"x": normal(2, 4)}, ["y"], ranges={"z": (0, 1)})
    with pytest.raises(ExportError, match="do not name its 2 dimensions"):
        interface_from_module(Returns(lambda x: x), {"x": normal(2, 4)}, ["y"], axes={"x": "NTC"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    network = seeded(SmallCnn)
    with torch.no_grad():
        network.features[4].weight[3, 2, 1, 0] = value
    with pytest.raises(ExportError, match=r"parameter 'features.4.weight' has NaN or infinite") as caught:
        interface_from_module(network, {"image": normal(1, 1, 8, 8)}, ["logits"])
    assert "checkpoint" in caught.value.hint


def test_buffers_may_be_infinite_but_not_nan():
    network = Returns(lambda x: x)
    network.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    evaluation_copy(network)
    network.register_buffer("mean", torch.tensor([0.0, torch.nan]))
    with pytest.raises(ExportError, match="buffer 'mean'"):
        evaluation_copy(network)


def test_weights_must_be_there_and_float32():
    with pytest.raises(ExportError, match="has no shape yet"):
        evaluation_copy(nn.LazyLinear(3))
    with pytest.raises(ExportError, match=r"'weight' is torch.float64") as caught:
        evaluation_copy(nn.Linear(2, 3).double())
    assert caught.value.hint == "model.float()"
    with pytest.raises(ExportError, match=r"is a str, not a torch\.nn\.Module"):
        evaluation_copy("model.pt")


def test_wrong_inputs_are_input_errors():
    predict = torch_predict(
        seeded(SmallCnn), interface_from_module(seeded(SmallCnn), {"image": normal(1, 1, 8, 8)}, ["y"])
    )
    with pytest.raises(InputError, match="'image' has shape"):
        predict({"image": normal(1, 1, 9, 8)})
    assert predict({"image": normal(1, 1, 8, 8)})["y"].shape == (1, 10)


def test_the_callers_arrays_are_not_written_to():
    network = Returns(lambda x: x.add_(1.0))
    x = normal(2, 4)
    before = x.copy()
    predict = torch_predict(network, interface_from_module(network, {"x": x}, ["y"]))
    predict({"x": x})
    np.testing.assert_array_equal(x, before)
