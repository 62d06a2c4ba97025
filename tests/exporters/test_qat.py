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

from outrider_exporters import QAT, Data
from outrider_exporters.convert import predict_file
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.onnx_weights import quantize_symmetric
from outrider_exporters.convert.quantize import quantize_onnx
from outrider_exporters.passes.base import PassContext, call_fit
from outrider_exporters.passes.qat import round_activation, round_weight, rounding
from outrider_exporters.sources.module import PositionalModule, interface_from_module
from outrider_runtimes.errors import ConfigError, ExportError
from support.networks import digits
from support.outlier import TRAIN_ROWS, planted, trained

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


def test_a_rounded_weight_is_what_a_file_stores():
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(np.float32))
    rounded = round_weight(weight)
    stored, scale = quantize_symmetric(weight.numpy(), 0)
    np.testing.assert_allclose(rounded.numpy(), stored * scale.reshape(-1, 1, 1, 1), atol=1e-6)
    torch.testing.assert_close(round_weight(rounded), rounded)  # once on the steps, it stays there


def context(network: nn.Module, fit) -> tuple[PositionalModule, PassContext]:
    images, targets = digits()
    example = {"image": images[:100]}
    interface = interface_from_module(network, example, ["logits"])
    data = Data(
        train=({"image": images[:TRAIN_ROWS]}, targets[:TRAIN_ROWS]),
        calibration=example,
        test=({"image": images[TRAIN_ROWS:]}, targets[TRAIN_ROWS:]),
    )
    copied = PositionalModule(network, ["image"], ["logits"]).requires_grad_(True)
    return copied, PassContext(interface=interface, example=example, data=data, fit=fit)


def fit(model: nn.Module, train, epochs: int = 4) -> None:
    inputs, targets = train
    x, y = torch.from_numpy(inputs["image"]), torch.from_numpy(targets)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(y), generator=generator).split(64):
            loss = functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracies(network: nn.Module, work: PassContext, folder) -> tuple[float, float]:
    """Of the float file and of the int8 file."""
    inputs, targets = work.data.test
    plain = to_onnx(network, work.interface, work.example, folder / "m.onnx")
    small = quantize_onnx(plain, [work.data.calibration], work.interface, folder / "q.onnx")
    files = (plain, small)
    exact, rounded = (
        float((predict_file(f, work.interface)(inputs)["logits"].argmax(-1) == targets).mean()) for f in files
    )
    return exact, rounded


def test_it_meets_a_gate_that_neither_int8_nor_fine_tuning_of_equal_length_meets(tmp_path):
    broken = planted(trained())
    network, work = context(broken, fit)
    exact, rounded = accuracies(broken, work, tmp_path)
    assert exact > 0.93
    gate = exact - 0.01
    assert rounded < gate

    tuned, _ = context(broken, fit)
    call_fit(tuned, work)
    assert accuracies(tuned.module, work, tmp_path)[1] < gate

    before = copy.deepcopy(network.state_dict())
    assert QAT().call(network, work) == {"layers": 5, "rounds": 1}
    assert accuracies(network.module, work, tmp_path)[1] >= gate
    assert set(network.state_dict()) == set(before)  # nothing of the rounding is left behind
    assert all(p.requires_grad for p in network.parameters())


def test_a_fit_that_fails_leaves_a_network_without_rounding():
    def failing(model, train):
        raise ValueError("no more")

    network, work = context(trained(), failing)
    names = set(network.state_dict())
    with pytest.raises(ExportError, match="no more"):
        QAT().call(network, work)
    assert set(network.state_dict()) == names
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_frozen_layers_and_token_ids_go_through():
    table, dense = nn.Embedding(5, 4), nn.Linear(4, 2)
    dense.weight.requires_grad_(False)
    with rounding([dense]):
        dense(table(torch.tensor([[1, 2]]))).sum().backward()
    assert not dense.weight.requires_grad
    assert table.weight.grad is not None


def test_what_it_asks_for_is_said():
    _, work = context(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), None)
    with pytest.raises(ConfigError, match=r"qat needs fit and data\.train"):
        QAT().requires(work)
    QAT().requires(dataclasses.replace(work, fit=fit))
    network, work = context(nn.Sequential(nn.Flatten(), nn.ReLU()), fit)
    with pytest.raises(ExportError, match="no convolution and no dense layer"):
        QAT().call(network, work)
