"""The passes on small networks: what they do, what they ask for, how they fail."""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from outrider_exporters import Data, Distill, Prune, Quantize
from outrider_exporters.data import check_data, draw_rows
from outrider_exporters.measure import latencies_p50_ms, metrics_of
from outrider_exporters.passes.base import Weight, call_fit, check_finite, seeded, weigh
from outrider_exporters.passes.losses import Head, distillation_loss
from outrider_exporters.passes.prune import slice_channels
from outrider_exporters.passes.slicing.trace import Wiring
from outrider_exporters.sources.module import PositionalModule, torch_predict
from outrider_runtimes.errors import ConfigError, ExportError
from support.exporters import Small, no_fit, random_data, same, state_of, workshop

pytestmark = pytest.mark.slow


# --- data


def test_good_data_passes():
    _, context = workshop(Small(), random_data())
    check_data(context.data, context.interface)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": None}, "data.test is None"),
        ({"calibration": {"image": np.zeros((0, 1, 8, 8), np.float32)}}, "data.calibration is empty"),
        ({"calibration": {"image": np.zeros((4, 8, 8), np.float32)}}, "data.calibration: input 'image' has shape"),
        ({"calibration": {"image": np.zeros((4, 1, 8, 8))}}, "data.calibration: input 'image' has dtype float64"),
        ({"calibration": {"image": np.full((4, 1, 8, 8), np.nan, np.float32)}}, "data.calibration: .* NaN"),
        ({"calibration": {"img": np.zeros((4, 1, 8, 8), np.float32)}}, "data.calibration: input 'image' is missing"),
        ({"calibration": np.zeros((4, 1, 8, 8), np.float32)}, "data.calibration is a ndarray"),
        ({"train": np.zeros(3)}, "data.train is not a pair"),
        (
            {"train": ({"image": np.zeros((4, 1, 8, 8), np.float32)}, np.zeros(3, int))},
            "4 rows of inputs and 3 targets",
        ),
        ({"train": ({"image": np.zeros((4, 1, 8, 8), np.float32)}, [0, 1, 2, 3])}, "targets are a list"),
        ({"train": ({"image": np.zeros((2, 1, 8, 8), np.float32)}, np.array([0.0, np.inf]))}, "targets have NaN"),
        ({"train": ({"image": np.zeros((2, 1, 4, 8), np.float32)}, np.zeros(2, int))}, "data.train inputs: .* shape"),
        ({"test": ({"image": np.zeros((0, 1, 8, 8), np.float32)}, np.zeros(0, int))}, "data.test is empty"),
        ({"test": ({"image": np.full((1, 1, 8, 8), np.inf, np.float32)}, 0)}, "data.test: .* infinite"),
    ],
)
def test_bad_data_is_refused_naming_the_part(change, words):
    _, context = workshop(Small(), random_data())
    with pytest.raises(ConfigError, match=words):
        check_data(dataclasses.replace(context.data, **change), context.interface)


def test_a_test_part_of_the_users_own_kind_is_left_alone():
    _, context = workshop(Small(), random_data())
    check_data(Data(test=iter([1, 2])), context.interface)
    check_data(Data(test=({"pixels": [1]}, 2)), context.interface)
    with pytest.raises(ConfigError, match="not a Data"):
        check_data({"test": 1}, context.interface)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_drawn_rows_are_distinct_in_order_and_the_same_for_the_same_seed(rows, seed):
    _, context = workshop(Small(), random_data(rows=20))
    inputs = {"image": np.arange(20, dtype=np.float32).reshape(20, 1, 1, 1) * np.ones((1, 1, 8, 8), np.float32)}
    drawn = draw_rows(inputs, context.interface, rows=rows, seed=seed)["image"][:, 0, 0, 0]
    assert len(drawn) == min(rows, 20)
    assert (np.diff(drawn) > 0).all()
    np.testing.assert_array_equal(
        drawn, draw_rows(inputs, context.interface, rows=rows, seed=seed)["image"][:, 0, 0, 0]
    )


# --- measuring


def test_metrics_are_plain_floats():
    metrics = metrics_of(lambda p, t: {"accuracy": np.float32(0.5), "n": 3}, dict, None, what="here")
    assert metrics == {"accuracy": 0.5, "n": 3.0}
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda p, t: 1 / 0, "evaluate raised ZeroDivisionError"),
        (lambda p, t: 0.97, "expected figures by name"),
        (lambda p, t: {}, "expected figures by name"),
        (lambda p, t: None, "expected figures by name"),
        (lambda p, t: {"accuracy": float("nan")}, "accuracy = nan"),
        (lambda p, t: {"accuracy": "high"}, "accuracy = 'high'"),
        (lambda p, t: {3: 0.5}, "the name 3"),
        (lambda p, t: {"f1": 0.5}, r"\['f1'\].*before that \['accuracy'\]"),
    ],
)
def test_an_evaluate_that_fails_is_named_with_whom_it_judged(evaluate, words):
    with pytest.raises(ExportError, match=words) as caught:
        metrics_of(evaluate, dict, None, what="after prune", expected={"accuracy": 1.0})
    assert "after prune" in str(caught.value)


def test_latencies_are_medians_of_shuffled_rounds():
    class Clock:
        now = 0.0

    def taking(milliseconds):
        def run():
            Clock.now += milliseconds / 1000.0

        return run

    times = latencies_p50_ms({"slow": taking(40.0), "fast": taking(2.0)}, seed=0, clock=lambda: Clock.now)
    assert times == pytest.approx({"slow": 40.0, "fast": 2.0})


# --- weighing


def test_weigh_counts_parameters_and_multiply_accumulates_of_one_row():
    network, context = workshop(Small(), random_data())
    conv = 64 * 9 * 16 + 16 * 9 * 16 * 32
    dense = 128 * 64 + 64 * 10
    assert weigh(network, context) == Weight(
        parameters=(9 * 16 + 16) + (9 * 16 * 32 + 32) + 2 * 32 + (128 * 64 + 64) + (64 * 10 + 10), macs=conv + dense
    )


def test_check_finite_names_the_weight():
    network, _ = workshop(Small(), random_data())
    with torch.no_grad():
        network.module.head[1].weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"'head\.1\.weight'"):
        check_finite(network)


def test_seeded_gives_the_same_numbers_and_leaves_the_callers_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    drawn = []
    for _ in range(2):
        with seeded(7):
            drawn.append([torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()])
    assert drawn[0] == drawn[1]
    assert [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()] == wanted


# --- prune


@pytest.mark.parametrize(
    ("ratio", "round_to", "kept"), [(0.5, 8, (8, 16, 32)), (0.3, 8, (8, 16, 40)), (0.25, 1, (12, 24, 48))]
)
def test_prune_makes_a_smaller_network_and_says_what_it_reached(ratio, round_to, kept):
    network, context = workshop(Small(), random_data(), fit=no_fit)
    before = weigh(network, context)
    detail = Prune(ratio=ratio, round_to=round_to).call(network, context)
    after = weigh(network, context)
    Prune(ratio=ratio).ensures(before, after)
    assert {name: now for name, (_, now) in detail["channels"].items()} == dict(
        zip(["features.0", "features.3", "head.1"], kept, strict=True)
    )
    assert detail["ratio_asked"] == ratio
    assert detail["ratio_reached"] == pytest.approx(1 - sum(kept) / 112, abs=1e-4)
    assert after.parameters < before.parameters
    assert after.macs < before.macs
    assert network.module.head[4].out_features == 10


def test_prune_keeps_the_channels_of_greatest_weight():
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(16, 4) * torch.arange(1.0, 17.0)[:, None])
        model[2].weight.fill_(1.0)
    network = PositionalModule(model, ["x"], ["logits"])
    network.requires_grad_(True)
    slice_channels(network, (torch.ones(2, 4),), ratio=0.5, round_to=8)
    assert network.module[0].weight[:, 0].tolist() == list(range(9, 17))


class TwoHeads(nn.Module):
    """A residual block, a depthwise convolution and two outputs, one of which is also looked at by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.first = nn.Linear(32, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.point(self.depthwise(x)) + x).mean((2, 3))
        latent = self.first(x)
        return {"latent": latent, "scores": torch.softmax(self.second(torch.relu(latent)), -1)}


def test_layers_that_make_an_output_are_found_and_kept():
    network = PositionalModule(TwoHeads(), ["x"], ["scores", "latent"])
    network.requires_grad_(True)
    examples = (torch.randn(2, 3, 8, 8),)
    found = Wiring(network, examples).outputs
    assert set(found) == {network.module.first, network.module.second}
    slice_channels(network, examples, ratio=0.5, round_to=8)
    assert [tuple(out.shape) for out in network(*examples)] == [(2, 4), (2, 16)]
    assert network.module.stem.out_channels == network.module.depthwise.out_channels == 16


def test_prune_keeps_which_parameters_are_trained():
    network, context = workshop(Small(), random_data(), fit=no_fit)
    network.module.features.requires_grad_(False)
    Prune(ratio=0.5).call(network, context)
    frozen = {name for name, p in network.module.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in network.module.named_parameters() if name.startswith("features")}


class OnlyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 10, batch_first=True)

    def forward(self, image):
        return self.gru(image[:, 0])[0][:, -1]


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (OnlyOutputs(), Prune(ratio=0.5), "removed nothing .gru: its hidden state is an output."),
        (Small(width=8), Prune(ratio=0.01, round_to=64), "removed nothing"),
    ],
)
def test_a_prune_that_removes_nothing_is_an_error_and_fit_is_not_called(model, config, words):
    def must_not_run(model, train):
        raise AssertionError

    network, context = workshop(model, random_data(), fit=must_not_run)
    with pytest.raises(ExportError, match=words) as caught:
        config.call(network, context)
    assert "makes the outputs" in caught.value.hint
    assert "torch.nn" in caught.value.hint


@pytest.mark.parametrize(("options", "word"), [({}, "fit"), ({"fit": no_fit, "data": Data(test=1)}, "data.train")])
def test_prune_asks_for_what_it_needs(options, word):
    _, context = workshop(Small(), random_data())
    with pytest.raises(ConfigError, match=word):
        Prune(ratio=0.5).requires(dataclasses.replace(context, **options))


def test_ensures_refuses_a_network_that_did_not_shrink():
    with pytest.raises(ExportError, match="10 of 10 parameters"):
        Prune(ratio=0.5).ensures(Weight(parameters=10, macs=10), Weight(parameters=10, macs=9))


# --- fit


def test_fit_gets_the_users_own_module_in_training_mode_and_the_training_part():
    seen = {}

    def looking(model, train):
        seen.update(kind=type(model), training=model.training, train=train)

    network, context = workshop(Small(), random_data(), fit=looking)
    call_fit(network, context)
    assert seen == {"kind": Small, "training": True, "train": context.data.train}
    assert not any(module.training for module in network.modules())


def test_a_fit_that_raises_or_replaces_the_network_is_named():
    def broken(model, train):
        raise RuntimeError("out of cheese")

    network, context = workshop(Small(), random_data(), fit=broken)
    with pytest.raises(ExportError, match="fit raised RuntimeError: out of cheese"):
        call_fit(network, context)
    with pytest.raises(ExportError, match="another network"):
        call_fit(network, dataclasses.replace(context, fit=lambda model, train: copy.deepcopy(model)))


# --- distill


def test_the_loss_is_hintons():
    student, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.2, 1.5, 3.0]])
    target = torch.tensor([2])
    p, q = torch.softmax(teacher / 3.0, -1), torch.softmax(student / 3.0, -1)
    soft = float((p * (p.log() - q.log())).sum())
    hard = -float(torch.log_softmax(student, -1)[0, 2])
    loss = distillation_loss(Head(kind="classes"), student, teacher, target, temperature=3.0, alpha=0.7)
    assert float(loss) == pytest.approx(0.7 * 9.0 * soft + 0.3 * hard, rel=1e-5)
    alike = distillation_loss(Head(kind="classes"), teacher, teacher, target, temperature=3.0, alpha=1.0)
    assert float(alike) == pytest.approx(0.0, abs=1e-6)


def test_distill_teaches_what_the_teacher_knows():
    data = random_data(rows=256)
    torch.manual_seed(3)
    teacher = Small(width=8)
    with torch.no_grad():
        teacher.head[4].weight.mul_(20.0)
    teacher.eval()
    wanted = torch_predict_classes(teacher, data)
    network, context = workshop(Small(width=8), data, teacher=teacher, seed=1)
    before = (torch_predict_classes(network.module, data) == wanted).mean()
    detail = Distill(epochs=15, alpha=1.0, learning_rate=3e-3).call(network, context)
    after = (torch_predict_classes(network.module, data) == wanted).mean()
    assert detail["loss_last_epoch"] < detail["loss_first_epoch"]
    assert after > max(before, 0.7)
    assert not network.training


def torch_predict_classes(model, data):
    _, context = workshop(model, data)
    return torch_predict(model, context.interface)(data.train[0])["logits"].argmax(-1)


def test_distill_is_the_same_for_the_same_seed_and_shows_progress():
    data, teacher = random_data(), Small(width=8)
    events, states = [], []
    torch.manual_seed(0)
    model = Small(width=8)
    for seed in (1, 1, 2):
        network, context = workshop(model, data, teacher=teacher, seed=seed, progress=events.append)
        with seeded(seed):
            Distill(epochs=2).call(network, context)
        states.append(state_of(network.module))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])
    assert [(e.step, e.done, e.total) for e in events[:2]] == [("distill", 1, 2), ("distill", 2, 2)]
    assert "loss" in events[0].message


def test_distill_leaves_the_teacher_as_it_is():
    teacher = Small(width=8).train()
    before = state_of(teacher)
    network, context = workshop(Small(width=8), random_data(), teacher=teacher)
    Distill(epochs=1).call(network, context)
    assert same(before, state_of(teacher))
    assert teacher.training


def test_batch_norm_survives_a_last_batch_of_one_row():
    data = random_data(rows=33)
    network, context = workshop(Small(width=8), data, teacher=Small(width=8))
    Distill(epochs=1, batch_size=32).call(network, context)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": None}, "needs a teacher"),
        ({"data": Data(test=1)}, "needs data.train"),
        (
            {"data": Data(train=({"image": np.zeros((2, 1, 8, 8))}, np.eye(10)[:2]), test=1)},
            "do not belong together",
        ),
    ],
)
def test_distill_asks_for_what_it_needs(options, words):
    _, context = workshop(Small(), random_data(), teacher=Small())
    with pytest.raises(ConfigError, match=words):
        Distill().requires(dataclasses.replace(context, **options))


def test_distill_names_an_output_that_is_not_there():
    _, context = workshop(Small(), random_data(), teacher=Small())
    Distill(output="logits").requires(context)
    with pytest.raises(ConfigError, match="no output 'scores'"):
        Distill(output="scores").requires(context)


class FiveClasses(Small):
    def __init__(self) -> None:
        super().__init__(width=8)
        self.head[4] = nn.Linear(64, 5)


def test_a_teacher_or_targets_of_other_classes_are_refused():
    data = random_data()
    network, context = workshop(Small(width=8), data, teacher=FiveClasses())
    with pytest.raises(ConfigError, match="teacher gives 5 classes, the network 10"):
        Distill(epochs=1).call(network, context)
    network, context = workshop(FiveClasses(), data, teacher=FiveClasses())
    with pytest.raises(ConfigError, match="targets 0 to 9, the network 5 classes"):
        Distill(epochs=1).call(network, context)


def test_a_teacher_that_cannot_run_is_named():
    network, context = workshop(Small(width=8), random_data(), teacher=nn.Linear(3, 10))
    with pytest.raises(ExportError, match="the teacher: Linear failed"):
        Distill(epochs=1).call(network, context)


def test_a_loss_that_diverges_stops_the_pass():
    network, context = workshop(Small(width=8), random_data(), teacher=Small(width=8))
    with pytest.raises(ExportError, match="the loss is"):
        Distill(epochs=50, learning_rate=1e30).call(network, context)


def test_a_network_without_trainable_parameters_is_refused():
    network, context = workshop(Small(width=8), random_data(), teacher=Small(width=8))
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires a gradient"):
        Distill(epochs=1).call(network, context)


# --- quantize


def test_quantize_asks_for_calibration_rows():
    _, context = workshop(Small(), random_data())
    Quantize().requires(context)
    with pytest.raises(ConfigError, match=r"data\.calibration"):
        Quantize().requires(dataclasses.replace(context, data=Data(test=1)))
