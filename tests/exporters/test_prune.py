"""Prune with its targets, scopes and steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters import Data, Prune
from outrider_exporters.convert import parity, predict_file
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.passes import run_passes
from outrider_exporters.passes.base import weigh
from outrider_exporters.passes.latency import latencies_of
from outrider_exporters.passes.plan import Group
from outrider_exporters.passes.sensitivity import Point, Sensitivity
from outrider_exporters.passes.slicing import Slicer
from outrider_exporters.sources.module import PositionalModule, interface_from_module, torch_predict
from outrider_runtimes.errors import ConfigError, ExportError, NoEngine
from support.exporters import Small, accuracy, digits, no_fit, random_data, trained, workshop

pytestmark = pytest.mark.slow


def rounding_steps_up(network, kept, originals, round_to):
    """For each pruned group, the plan with one rounding step less taken."""
    for name, left in kept.items():
        if left < originals[name]:
            yield {**kept, name: min(originals[name], left + round_to)}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_mac_target_is_reached_within_one_rounding_step(scope, share):
    torch.manual_seed(0)
    model = Small(width=32)
    network, context = workshop(model, random_data(), fit=no_fit)
    before = weigh(network, context).macs
    detail = Prune(macs=share, scope=scope, round_to=4).call(network, context)
    reached = 1.0 - weigh(network, context).macs / before
    assert reached >= share
    assert detail["macs_reached"] == pytest.approx(reached, abs=1e-4)
    assert detail["macs_asked"] == share

    def with_plan(plan):
        fresh, _ = workshop(model, random_data())
        Slicer(fresh, (torch.rand(2, 1, 8, 8),), round_to=4).apply(plan)
        return 1.0 - weigh(fresh, context).macs / before

    originals = {name: group["before"] for name, group in detail["groups"].items()}
    kept = {name: group["after"] for name, group in detail["groups"].items()}
    assert any(with_plan(plan) < share for plan in rounding_steps_up(network, kept, originals, 4))


def test_macs_out_of_reach_are_refused_with_what_is_left():
    network, context = workshop(Small(), random_data(), fit=no_fit)
    with pytest.raises(ExportError, match="MACs are left when all that can go is gone"):
        Prune(macs=0.99).call(network, context)


def test_the_global_scope_takes_from_the_layer_that_matters_least():
    torch.manual_seed(0)
    model = Small(width=32)
    with torch.no_grad():
        model.head[1].weight[:48] *= 1e-3
        model.head[4].weight[:, :48] *= 1e-3
    network, context = workshop(model, random_data(), fit=no_fit)
    detail = Prune(ratio=0.25, scope="global").call(network, context)
    assert detail["groups"]["head.1"]["after"] == 24
    assert detail["groups"]["features.3"]["after"] == 64
    assert detail["ratio_reached"] == 0.25


@pytest.mark.parametrize("options", [{"ratio": 0.75}, {"macs": 0.8}, {"ratio": 0.6, "scope": "global"}])
def test_steps_fine_tune_between_and_reach_the_same_share(options):
    sizes = []

    def watching(model, train):
        sizes.append(sum(p.numel() for p in model.parameters()))

    torch.manual_seed(0)
    model = Small(width=32)
    network, context = workshop(model, random_data(), fit=watching)
    detail = Prune(**options, steps=3).call(network, context)
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert [step["step"] for step in detail["steps"]] == [1, 2, 3]
    reached = detail["macs_reached"] if "macs" in options else detail["ratio_reached"]
    assert reached >= options.get("macs", options.get("ratio"))
    if "scope" not in options:
        once, context = workshop(model, random_data(), fit=no_fit)
        Prune(**options).call(once, context)
        assert weigh(once, context) == weigh(network, context)


def test_a_step_that_rounds_to_nothing_does_not_fine_tune():
    calls = []
    network, context = workshop(Small(width=8), random_data(), fit=lambda model, train: calls.append(1))
    detail = Prune(ratio=0.5, steps=2, round_to=32).call(network, context)
    assert len(calls) == len(detail["steps"]) == 1


# --- sensitivity


def scanning(config, seed=0):
    data = digits()
    model = trained(Small, data, seed=0, epochs=4)
    network, context = workshop(model, data, fit=no_fit, evaluate=accuracy, seed=seed)
    return network, context, config.call(network, context)


def test_a_scan_stays_within_the_drop_it_may_cost():
    network, context, detail = scanning(Prune(scope="scan", max_drop_points=5.0, round_to=4))
    scan = detail["sensitivity"]
    assert (scan["metric"], scan["rows"]) == ("accuracy", 1000)
    assert {point["group"] for point in scan["points"]} == {"features.0", "features.3", "head.1"}
    for point in scan["points"]:
        assert point["kept"] < point["units"]
        assert 0.0 < point["macs"] < 1.0
    kept = {name: group["after"] for name, group in detail["groups"].items()}
    points = tuple(Point(**point) for point in scan["points"])
    chosen = Sensitivity(metric="accuracy", value=scan["value"], rows=scan["rows"], points=points)
    assert chosen.drop_points(kept) <= 5.0
    # The network loses less where it is more sensitive, so the shares differ.
    assert len({round(group["after"] / group["before"], 2) for group in detail["groups"].values()}) > 1
    train = context.data.train
    measured = accuracy(lambda inputs: {"logits": predict(network, inputs)}, train)["accuracy"]
    assert measured >= scan["value"] - 0.25


def predict(network, inputs):
    with torch.no_grad():
        return network(torch.from_numpy(inputs["image"]))[0].numpy()


def test_a_scan_with_a_target_reaches_it_or_refuses():
    _, _, detail = scanning(Prune(scope="scan", macs=0.3, max_drop_points=100.0, round_to=4))
    assert detail["macs_reached"] >= 0.3
    with pytest.raises(ExportError, match=r"points before fine-tuning, max_drop_points allows 0\.1"):
        scanning(Prune(scope="scan", macs=0.8, max_drop_points=0.1))


def test_a_scan_asks_about_training_rows_only():
    seen = []

    def watching(predict, part):
        seen.append(part[0]["image"])
        return {"accuracy": 0.5}

    data = random_data()
    network, context = workshop(Small(), data, fit=no_fit, evaluate=watching)
    Prune(scope="scan", max_drop_points=1.0).call(network, context)
    assert all(np.array_equal(images, data.train[0]["image"]) for images in seen)
    with pytest.raises(ConfigError, match=r"data\.test must have their form"):
        Prune(scope="scan", max_drop_points=1.0).requires(
            dataclasses.replace(context, data=Data(train=data.train, test=object()))
        )
    with pytest.raises(ConfigError, match=r"data\.test must have their form"):
        Prune(scope="scan", max_drop_points=1.0).requires(dataclasses.replace(context, evaluate=None))


@pytest.mark.parametrize(
    ("metrics", "metric", "words"),
    [
        ({"a": 0.5, "b": 0.5}, "", "needs to know its metric; evaluate gives a, b"),
        ({"a": 0.5}, "f1", "needs to know its metric"),
        ({"loss": 3.5}, "", "'loss' is 3.5; points are of a metric in 0..1"),
    ],
)
def test_a_scan_needs_a_metric_that_has_points(metrics, metric, words):
    network, context = workshop(Small(), random_data(), fit=no_fit, evaluate=lambda predict, part: metrics)
    with pytest.raises(ConfigError, match=words):
        Prune(scope="scan", max_drop_points=1.0, metric=metric).call(network, context)


def test_what_was_not_scanned_is_between_what_was():
    points = (
        Point(group="a", units=16, kept=12, drop_points=1.0, macs=0.1),
        Point(group="a", units=16, kept=8, drop_points=3.0, macs=0.2),
    )
    scan = Sensitivity(metric="accuracy", value=0.9, rows=10, points=points)
    assert scan.drop_points({"a": 16}) == 0.0
    assert scan.drop_points({"a": 14}) == pytest.approx(0.5)
    assert scan.drop_points({"a": 10}) == pytest.approx(2.0)
    assert scan.drop_points({"a": 4}) == pytest.approx(4.5)
    group = Group(name="a", kind="channels", units=16, step=4, importance=(1.0,) * 16)
    assert scan.price(group, 8, 12) == pytest.approx(20.0)


# --- what it gained


class Sequence(nn.Module):
    """image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10], by a recurrent layer and a Transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(8, 32, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
        self.narrow, self.out = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, image):
        return self.out(self.encoder(self.narrow(self.body(image[:, 0])[0]))[:, -1])


def test_recurrent_layers_heads_and_feed_forward_blocks_shrink_in_one_pass():
    network, context = workshop(Sequence(), random_data(), fit=no_fit)
    before = weigh(network, context)
    (stage,) = run_passes(network, [Prune(ratio=0.5)], context, lambda model, what: {"m": 1.0})
    groups = stage.detail["groups"]
    assert {name: (g["kind"], g["before"], g["after"]) for name, g in groups.items()} == {
        "encoder.linear1": ("channels", 64, 32),
        "encoder.self_attn": ("heads", 4, 2),
        "body": ("hidden", 32, 16),
    }
    assert stage.macs < 0.6 * before.macs


class Attending(nn.Module):
    """image: float32 [N, 1, 8, 8] -> logits: float32 [N, 10], by one layer of a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
        self.out = nn.Linear(16, 10)

    def forward(self, image):
        return self.out(self.encoder(self.enter(image[:, 0]))[:, -1])


def test_both_networks_are_timed_on_the_engine_of_a_device():
    network, context = workshop(Attending(), random_data(), fit=no_fit, time_networks=latencies_of)
    before = weigh(network, context)
    (stage,) = run_passes(network, [Prune(ratio=0.5)], context, lambda model, what: {"m": 1.0})
    latency = stage.detail["latency"]
    assert latency["before_ms"] > 0.0
    assert latency["after_ms"] > 0.0
    assert latency["macs_gain"] == pytest.approx(before.macs / stage.macs, abs=1e-3)


def test_a_network_with_fewer_heads_becomes_a_tflite_file(tmp_path):
    network, context = workshop(Attending(), random_data(), fit=no_fit)
    Prune(ratio=0.5).call(network, context)
    file = to_tflite(network.module, context.interface, context.example, tmp_path / "slim.tflite")
    wanted = torch_predict(network.module, context.interface)(context.example)
    assert parity(wanted, predict_file(file, context.interface)(context.example)) <= 1e-5


def test_a_network_that_cannot_be_timed_says_so():
    def cannot(networks, context):
        raise NoEngine("no engine here runs 'onnx' files")

    network, context = workshop(Small(), random_data(), fit=no_fit, time_networks=cannot)
    assert Prune(ratio=0.5).call(network, context)["latency"] == {"unmeasured": "no engine here runs 'onnx' files"}
    network, context = workshop(Small(), random_data(), fit=no_fit)
    assert Prune(ratio=0.5).call(network, context)["latency"] is None


def test_fused_layers_are_counted_too():
    model = nn.Sequential(nn.LSTM(8, 16, batch_first=True)).eval()

    class Last(nn.Module):
        def __init__(self, body) -> None:
            super().__init__()
            self.body = body

        def forward(self, x):
            y = self.body(x)
            return y[0] if isinstance(y, tuple) else y

    x = np.zeros((2, 5, 8), np.float32)
    for body, macs in (
        (model[0], 5 * 4 * 16 * (8 + 16)),
        (nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 5 * (4 * 64 + 2 * 256) + 2 * 5 * 5 * 8),
    ):
        interface = interface_from_module(Last(body), {"x": x}, ["y"])
        network = PositionalModule(Last(body), ["x"], ["y"])
        _, context = workshop(Small(), random_data())
        context = dataclasses.replace(context, interface=interface, example={"x": x})
        assert weigh(network, context).macs == macs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "ratio is 0.0"),
        ({"ratio": 0.5, "macs": 0.5}, "both given"),
        ({"macs": 1.0}, "macs is 1.0"),
        ({"ratio": 0.5, "steps": 0}, "steps is 0"),
        ({"ratio": 0.5, "scope": "local"}, "scope is 'local'"),
        ({"scope": "scan"}, "max_drop_points is 0.0"),
        ({"ratio": 0.5, "max_drop_points": 2.0}, "are for a scan"),
        ({"ratio": 0.5, "metric": "accuracy"}, "are for a scan"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Prune(**options)
