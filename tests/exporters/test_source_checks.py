"""What of a network is refused before any tool sees it, because the tools accept it without a word."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from outrider_exporters.sources.checks import check_answers
from outrider_exporters.sources.module import evaluation_copy, interface_from_module
from outrider_runtimes.errors import ExportError
from support.networks import Returns, SmallCnn, normal, seeded

pytestmark = pytest.mark.slow


def refused(module: nn.Module, words: str, x=None) -> ExportError:
    with pytest.raises(ExportError, match=words) as caught:
        interface_from_module(module, {"x": normal(4, 6) if x is None else x}, ["y"])
    return caught.value


def test_dropout_that_is_always_on_is_found():
    error = refused(Returns(lambda x: functional.dropout(x, 0.5)), "'y' differs from run to run")
    assert "training=self.training" in error.hint
    refused(Returns(lambda x: x + torch.randn_like(x)), "random numbers")


def test_dropout_that_follows_the_mode_is_not_touched():
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train()
    interface_from_module(module, {"x": normal(4, 6)}, ["y"])
    assert module.training


def test_rows_that_see_each_other_are_found():
    error = refused(Returns(lambda x: x - x.mean(0, keepdim=True)), "'y' of a row depends on the rows beside it")
    assert "axis 0" in error.hint


def test_batch_norm_without_statistics_is_named_even_for_one_row():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    error = refused(module, r"layer '1' \(BatchNorm1d\) has no running statistics", normal(1, 6))
    assert "track_running_stats=True" in error.hint
    evaluation_copy(nn.InstanceNorm2d(3))  # its statistics are a row's own


def test_quantized_layers_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(seeded(SmallCnn), {nn.Linear})
    error = refused(
        module, r"layer 'head\.2' \(torch\.ao\.nn\.quantized\.dynamic\S+ is quantized already", normal(2, 1, 8, 8)
    )
    assert "Quantize in the recipe" in error.hint


def test_weights_quantized_by_torchao_are_named():
    import torchao.quantization as torchao

    module = nn.Sequential(nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
    refused(module, r"parameter '0\.weight' is a torchao\S+ it is quantized already", normal(2, 64))


def test_a_batch_of_another_size_may_round_differently():
    first = normal(2, 5)
    check_answers(["y"], [first], [first], [np.concatenate([first + 1e-6, first[:1]])])
    check_answers(["y"], [np.zeros((2, 3), np.float32)], [np.zeros((2, 3), np.float32)], [np.zeros((3, 3), np.float32)])
    check_answers(["n"], [np.array(3.0)], [np.array(3.0)], [np.array(4.0)])  # no N: free to follow the batch
    with pytest.raises(ExportError, match="depends on the rows"):
        check_answers(["y"], [first], [first], [np.concatenate([first * 1.1, first[:1]])])
    with pytest.raises(ExportError, match="random"):
        check_answers(["y"], [first], [first * 1.1], [first])
