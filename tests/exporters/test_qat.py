from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from outrider_exporters import QAT
from outrider_exporters.convert.fuse import fold_norms
from outrider_exporters.convert.onnx_weights import quantize_symmetric
from outrider_exporters.passes.rounding import Rounding, round_activation, round_weight, trace
from outrider_runtimes.errors import ConfigError, ExportError
from support.networks import SmallCnn, normal, seeded
from support.training import Written, digits_context, fitting

pytestmark = pytest.mark.slow

numbers = st.floats(-100, 100, width=32)


@given(st.lists(numbers, min_size=1, max_size=40), numbers, numbers)
def test_activations_go_to_one_of_256_steps(values, low, high):
    low, high = min(low, high), max(low, high)
    given_values = torch.tensor(values, requires_grad=True)
    rounded = round_activation(given_values, low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, 1e-12)
    places = rounded.detach().double() / step
    np.testing.assert_allclose(places, places.round(), atol=2e-3)
    assert places.max() - places.min() < 255.5
    inside = (given_values > low + step) & (given_values < high - step)
    assert ((rounded - given_values).abs()[inside] <= 0.51 * step + 1e-6).all()
    rounded.sum().backward()
    assert (given_values.grad[inside] == 1.0).all()
    assert not round_activation(torch.zeros(3), low, high).any()


@pytest.mark.parametrize("axis", [0, -1, None])
def test_a_rounded_weight_is_what_a_file_stores(axis):
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 3, 3, 4)).astype(np.float32))
    rounded = round_weight(weight, axis)
    stored, scale = quantize_symmetric(weight.numpy(), axis)
    scales = scale if axis is None else scale.reshape([-1 if at == axis % 4 else 1 for at in range(4)])
    np.testing.assert_allclose(rounded.numpy(), stored * scales, atol=1e-6)
    torch.testing.assert_close(round_weight(rounded, axis), rounded)  # once on the steps, it stays there


def by_hand(network: nn.Sequential, image: torch.Tensor, ranges: list[tuple[float, float]]) -> torch.Tensor:
    """Convolution, ReLU, pool, flatten, dense layer with every rounding written out."""
    conv, _, _, _, dense = network
    x = round_activation(image, *ranges[0])
    x = functional.conv2d(x, round_weight(conv.weight), conv.bias, padding=1)
    x = functional.max_pool2d(round_activation(x.relu(), *ranges[1]), 2).flatten(1)
    return round_activation(functional.linear(x, round_weight(dense.weight), dense.bias), *ranges[2])


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
        )


def rounding_of(network: nn.Module, image: torch.Tensor) -> Rounding:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.module(x),)

    traced = trace(One().eval(), ["image"], (image,))
    groups = sorted(traced.places.labels)
    return Rounding(traced, per_channel=True, ranges=dict.fromkeys(groups, (-1.5, 1.5)))


def test_a_forward_rounds_what_a_file_rounds():
    network, image = small(), torch.from_numpy(normal(5, 1, 8, 8))
    rounding = rounding_of(network, image)
    ranges = [rounding.ranges[group] for group in sorted(rounding.ranges)]
    assert list(rounding.trace.places.labels.values()) == ["image", "0 relu", "4 linear"]
    with rounding.on(network):
        answers = network.train()(image)
        torch.testing.assert_close(answers, by_hand(network, image, ranges))
        answers.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    by_hand(network, image, ranges).square().sum().backward()
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    network.zero_grad()
    assert not torch.equal(network(image), answers)  # outside nothing is rounded


def test_ranges_follow_the_batches_in_training_only():
    network, image = small(), torch.from_numpy(normal(5, 1, 8, 8))
    rounding = rounding_of(network, image)
    with rounding.on(network):
        network.eval()(100 * image)
        assert (rounding.forwards, rounding.ranges[0]) == (0, (-1.5, 1.5))
        network.train()(image)
    assert rounding.forwards == 1
    low, high = rounding.ranges[0]
    assert low == pytest.approx(-1.5 + 0.1 * (float(image.min()) + 1.5))
    assert high == pytest.approx(1.5 + 0.1 * (float(image.max()) - 1.5))


def test_tensors_that_are_changed_in_place_are_rounded_too():
    def forward(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        x.add_(0.25)  # what it gives is not taken
        y = layers["conv"](x)
        y.mul_(2.0)
        return layers["dense"](y.flatten(1))

    layers = {"conv": nn.Conv2d(1, 2, 3), "dense": nn.Linear(72, 3)}
    network, image = Written(forward, **layers), torch.from_numpy(normal(2, 1, 8, 8))
    rounding = rounding_of(network, image.clone())
    conv, dense = layers["conv"], layers["dense"]
    with rounding.on(network), torch.no_grad():
        answers = network(image.clone())
        x = round_activation(round_activation(image, -1.5, 1.5) + 0.25, -1.5, 1.5)
        x = functional.conv2d(x, round_weight(conv.weight), conv.bias)
        x = round_activation(round_activation(x, -1.5, 1.5) * 2.0, -1.5, 1.5)
        expected = functional.linear(x.flatten(1), round_weight(dense.weight), dense.bias)
    torch.testing.assert_close(answers, round_activation(expected, -1.5, 1.5))


def test_batch_norm_is_folded_and_the_network_stays_what_it_is():
    network, work = digits_context(seeded(SmallCnn).eval(), fitting(1))
    image = torch.from_numpy(work.data.train[0]["image"][:9])
    with torch.no_grad():
        before = network(image)[0]
        assert fold_norms(network, (image,)) == ("module.features.1",)
        torch.testing.assert_close(network(image)[0], before, rtol=1e-4, atol=1e-5)
    assert isinstance(network.module.features[1], nn.Identity)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_norm_s_bias_is_trained_where_the_norm_was():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval()
    network[1].bias.requires_grad_(False)

    class Tuple(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.module(x),)

    assert fold_norms(Tuple(network), (torch.from_numpy(normal(2, 1, 4, 4)),)) == ("module.1",)
    assert (network[0].weight.requires_grad, network[0].bias.requires_grad) == (True, False)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(8, 4, batch_first=True), "this one calls lstm"),
        (nn.RNN(8, 4, batch_first=True), "this one calls rnn_tanh"),
        (nn.GRU(8, 4, batch_first=True), "this one calls gru"),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "this one calls"),
        (nn.LayerNorm(8), "this one calls layer_norm"),
        (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.BatchNorm2d(1)), "batch norm .* cannot be folded"),
        (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.ConvTranspose2d(1, 2, 2)), "this one calls conv_transpose2d"),
    ],
)
def test_other_networks_are_refused_before_anything_runs(layer, message):
    def forward(layers: nn.ModuleDict, image: torch.Tensor) -> torch.Tensor:
        given = layers["layer"](image[:, 0])
        return layers["dense"]((given[0] if isinstance(given, tuple) else given).flatten(1).mean(1, keepdim=True))

    network, work = digits_context(Written(forward, layer=layer, dense=nn.Linear(1, 10)).eval(), fitting(1))
    with pytest.raises(ConfigError, match=message) as raised:
        QAT().requires(dataclasses.replace(work, network=network))
    assert raised.value.hint


def test_a_product_of_two_computed_tensors_is_attention():
    def forward(layers: nn.ModuleDict, image: torch.Tensor) -> torch.Tensor:
        keys = layers["first"](image[:, 0])
        return layers["dense"]((keys @ keys.transpose(1, 2)).flatten(1))

    network, work = digits_context(Written(forward, first=nn.Linear(8, 4), dense=nn.Linear(64, 10)).eval(), fitting(1))
    with pytest.raises(ExportError, match=r"multiplies two computed tensors \(layers.first matmul\)"):
        QAT().call(network, work)


def test_what_it_asks_for_is_said(tmp_path):
    _, work = digits_context(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), None)
    with pytest.raises(ConfigError, match=r"qat needs fit and data\.train"):
        QAT().requires(work)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        QAT(checkpoint=str(tmp_path / "file")).requires(dataclasses.replace(work, fit=fitting(1)))
    network, work = digits_context(nn.Sequential(nn.Flatten(), nn.ReLU()).eval(), fitting(1))
    with pytest.raises(ConfigError, match="no convolution and no dense layer"):
        QAT().requires(dataclasses.replace(work, network=network))
    assert not any(layer._forward_pre_hooks for layer in network.modules())


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda model, train: 1 / 0, "fit raised ZeroDivisionError"),
        (lambda model, train: None, "fit did not run the network in training mode"),
        (lambda model, train: model.eval()(torch.zeros(1, 1, 8, 8)), "fit did not run the network in training mode"),
    ],
)
def test_a_fit_that_fails_leaves_a_network_without_rounding(fit, message):
    network, work = digits_context(small().append(nn.Linear(3, 10)).eval(), fit)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ExportError, match=message):
        QAT().call(network, work)
    torch.testing.assert_close(dict(network.state_dict()), dict(before))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in network.modules())
    assert network.trained is None


@pytest.mark.parametrize("more", [True, False])
def test_a_forward_that_is_another_in_training_is_refused(more):
    def forward(layers: nn.ModuleDict, image: torch.Tensor) -> torch.Tensor:
        return (
            layers["dense"](image.flatten(1)).relu() if layers.training is more else layers["dense"](image.flatten(1))
        )

    network, work = digits_context(Written(forward, dense=nn.Linear(64, 10)).eval(), fitting(1))
    with pytest.raises(ExportError, match="does not make the calls in training that it makes in evaluation"):
        QAT().call(network, work)


def test_a_training_that_diverges_names_the_tensor():
    def fit(model: nn.Module, train: object) -> None:
        with torch.no_grad():
            model[0].bias.fill_(float("nan"))
        model(torch.zeros(1, 1, 8, 8))

    network, work = digits_context(small().append(nn.Linear(3, 10)).eval(), fit)
    with pytest.raises(ExportError, match="qat: 0 relu is NaN or infinite"):
        QAT().call(network, work)


def test_a_fit_that_changes_the_network_is_refused():
    def fit(model: nn.Module, train: object) -> None:
        model(torch.zeros(1, 1, 8, 8))
        model.append(nn.ReLU())

    network, work = digits_context(small().append(nn.Linear(3, 10)).eval(), fit)
    with pytest.raises(ExportError, match="fit changed what the network computes"):
        QAT().call(network, work)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    calls = []

    def fit(model: nn.Module, train: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fitting(1)(model, train)

    config = QAT(rounds=3, checkpoint=str(tmp_path))
    network, work = digits_context(small().append(nn.Linear(3, 10)).eval(), fit)
    whole, resumed = copy.deepcopy(network), copy.deepcopy(network)
    with pytest.raises(KeyboardInterrupt):
        config.call(network, work)
    assert config.call(resumed, work)["resumed_after_round"] == 2
    assert QAT(rounds=3).call(whole, work)["resumed_after_round"] == 0
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    pairs = zip(resumed.trained.tensors, whole.trained.tensors, strict=True)
    assert all(one.bounds == other.bounds for one, other in pairs)
    assert len(calls) == 7


def test_what_is_frozen_stays_frozen():
    network, image = small(), torch.from_numpy(normal(2, 1, 8, 8))
    network[0].weight.requires_grad_(False)
    with rounding_of(network, image).on(network):
        network(image).sum().backward()
    assert network[0].weight.grad is None
    assert network[4].weight.grad is not None
