"""The exporters' benchmark on a network of a few seconds: every file made, measured and judged. No time is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from benchmarks import networks
from benchmarks.exporters import making, measuring
from benchmarks.exporters.labels import AEQ_DEFAULT, GIVEN_FLOAT, ORT_DEFAULT, PEERS
from benchmarks.exporters.sizes import weight_bytes
from benchmarks.exporters.subjects import INPUT, Material, Subject, Tuning
from benchmarks.raw import open_raw
from torch import nn

from outrider_exporters import Data

pytestmark = pytest.mark.slow

ROWS = 200
WEIGHTS = 3 * 16 * 9 + 16 * 16 * 9 + 16 * 4


def small() -> Material:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    images = np.random.default_rng(0).random((ROWS, 3, 8, 8), np.float32)
    with torch.inference_mode():
        classes = module(torch.from_numpy(images)).argmax(1).numpy()
    rows = {INPUT: images}
    return Material(module=module, data=Data(train=(rows, classes), calibration=rows, test=(rows, classes)))


SUBJECT = Subject(
    name="small", text="A small network, 8x8x3", make=small, speedup=1.5, calls_a_block=5,
    tuning=Tuning(ratio=0.5, epochs=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / SUBJECT.name
    making.make_subject(SUBJECT, path)
    return path


def test_the_networks_have_as_many_parameters_as_their_papers_say():
    # ResNet-18 and MobileNetV2 1.0 with 1,000 classes, as torchvision counts them.
    for build, parameters in ((networks.resnet18, 11_689_512), (networks.mobilenet_v2, 3_504_872)):
        assert sum(p.numel() for p in build().parameters()) == parameters


def test_settled_networks_neither_fade_nor_explode():
    network = networks.settled(networks.seeded(networks.mobilenet_v2), (3, 64, 64))
    with torch.inference_mode():
        spread = float(network(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))).std())
    assert 0.01 < spread < 100.0
    assert not network.training


def test_every_peer_is_made_and_answers_as_the_network_does(folder):
    made = making.read_made(folder)
    material = small()
    assert set(PEERS) < set(made["files"])
    with torch.inference_mode():
        wanted = material.module(torch.from_numpy(material.test[0][:20])).numpy()
    for name, file in made["files"].items():
        answer = open_raw(folder / file["file"]).answer
        got = np.concatenate([answer(row[None]) for row in material.test[0][:20]])
        error = np.abs(got - wanted).max() / np.ptp(wanted)
        assert error < (1e-4 if file["float"] else 0.1), name
        assert weight_bytes(folder / file["file"]) == file["weight_bytes"] == WEIGHTS * (4 if file["float"] else 1)
        assert len(made["right"][name]) == ROWS
        assert made["right"][name].mean() > (0.99 if file["float"] else 0.8)


def test_the_peers_are_what_their_names_say(folder):
    import onnx

    files = making.read_made(folder)["files"]
    operators = {
        name: {node.op_type for node in onnx.load(str(folder / files[name]["file"])).graph.node}
        for name, peer in PEERS.items()
        if name.startswith("ORT")
    }
    assert "QuantizeLinear" not in operators["ORT fp32"]
    assert "DequantizeLinear" in operators[ORT_DEFAULT]
    assert "QLinearConv" in operators["ORT QOperator U8S8"]
    stored = {
        name: {item.data_type for item in onnx.load(str(folder / files[name]["file"])).graph.initializer}
        for name in (ORT_DEFAULT, "ORT QDQ U8S8 per channel")
    }
    assert onnx.TensorProto.UINT8 not in stored[ORT_DEFAULT]
    assert onnx.TensorProto.UINT8 in stored["ORT QDQ U8S8 per channel"]


def test_each_promise_has_its_lines(folder):
    result = measuring.measure_subject(SUBJECT, folder, glance=True)
    json.dumps(result)
    kept = [name for name in making.read_made(folder)["kept"] if not result["files"][name]["float"]]
    promises = [line["promise"] for line in result["promises"]]
    assert result["blocks"] == measuring.GLANCE_BLOCKS
    assert sum("int8" in text and "over" in text and "time" not in text for text in promises) == len(kept)
    assert sum("a kept int8 file" in text for text in promises) == len(kept)
    assert sum(text.endswith((ORT_DEFAULT, AEQ_DEFAULT)) for text in promises) == 2 * len(kept)
    assert sum("the best peer's" in text for text in promises) == 2
    assert sum("multiply-accumulates" in text for text in promises) == 1
    timed = set(result["latency"]["p50_us"])
    assert timed - set(result["files"]) >= {AEQ_DEFAULT + GIVEN_FLOAT}
    assert timed >= set(result["files"])
    assert result["pruning"]["macs"]["pruned"] < result["pruning"]["macs"]["unpruned"]


def test_where_no_int8_file_was_kept_float32_is_the_best_there_is():
    chosen = "ours: onnx-float32"
    files = {chosen: {"float": True}} | {name: {"float": peer.is_float} for name, peer in PEERS.items()}
    times = {name: np.full((4, 5), 100.0 + place) for place, name in enumerate(files)}
    pairs = measuring._pairs({"files": files, "chosen": chosen}, times)
    assert pairs["best int8 over best fp32"]["value"] == 1.0
    assert pairs["chosen over best peer"]["over"] == "ORT fp32"
    assert pairs[f"{chosen} over best fp32"]["of"] == chosen
