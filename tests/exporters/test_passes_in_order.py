"""Passes one after the other: what each left, whose failure it was, and the same bits for the same seed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from outrider_exporters import Distill, Prune
from outrider_exporters.measure import metrics_of
from outrider_exporters.passes import run_passes
from outrider_exporters.sources.module import torch_predict
from outrider_runtimes.errors import ExportError
from support.exporters import Small, accuracy, fit, no_fit, random_data, same, state_of, workshop

pytestmark = pytest.mark.slow


def test_stages_say_what_each_pass_left():
    data = random_data()
    network, context = workshop(Small(), data, fit=no_fit, teacher=Small())
    interface = context.interface

    def measure(model, what):
        return metrics_of(accuracy, torch_predict(model, interface), data.test, what=what)

    stages = run_passes(network, [Prune(ratio=0.5), Distill(epochs=1)], context, measure, clock=iter(range(9)).__next__)
    assert [stage.name for stage in stages] == ["prune", "distill"]
    assert stages[0].parameters == stages[1].parameters == sum(p.numel() for p in network.parameters())
    assert [stage.seconds for stage in stages] == [1, 1]
    assert stages[0].to_dict()["detail"]["ratio_reached"] == 0.5
    assert set(stages[1].to_dict()["metrics"]) == {"accuracy"}


def test_a_failure_names_the_pass_and_those_before_it():
    calls = []

    def second_time_lucky(model, train):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("boom")

    network, context = workshop(Small(width=32), random_data(), fit=second_time_lucky, teacher=Small())
    passes = [Distill(epochs=1), Prune(ratio=0.5), Prune(ratio=0.25)]
    with pytest.raises(ExportError) as caught:
        run_passes(network, passes, context, lambda model, what: {"m": 1.0})
    assert str(caught.value) == "passes[2] (prune), passes before it: distill, prune: fit raised RuntimeError: boom"


def test_a_fit_that_leaves_nan_is_the_passes_failure():
    def diverges(model, train):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    network, context = workshop(Small(), random_data(), fit=diverges)
    with pytest.raises(ExportError, match=r"passes\[0\] \(prune\).*'features\.0\.weight' has NaN"):
        run_passes(network, [Prune(ratio=0.5)], context, lambda model, what: {"m": 1.0})


def test_ctrl_c_in_fit_goes_through():
    def interrupted(model, train):
        raise KeyboardInterrupt

    network, context = workshop(Small(), random_data(), fit=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_passes(network, [Prune(ratio=0.5)], context, lambda model, what: {"m": 1.0})


def test_passes_are_the_same_for_the_same_seed_whatever_fit_draws():
    data, states = random_data(), []
    torch.manual_seed(0)
    model = Small(width=16)
    for noise in (1, 2):
        torch.manual_seed(noise)
        network, context = workshop(model, data, fit=lambda m, t: fit(m, t, 1), teacher=Small(width=16), seed=5)
        context = dataclasses.replace(context, teacher=copy.deepcopy(model))
        run_passes(network, [Prune(ratio=0.5), Distill(epochs=1)], context, lambda m, what: {"m": 1.0})
        states.append(state_of(network.module))
    assert same(*states)
