"""Converted files without names: smaller, bound as before, and the same answers bit for bit."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest

from outrider_exporters.convert import predict_file
from outrider_exporters.convert.files import open_session
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.convert.strip import stripped
from outrider_exporters.passes import Quantize
from support.converted import convert
from support.networks import Recurrent, SmallCnn, TokenClassifier, TwoSided, normal, seeded

pytestmark = pytest.mark.slow

FORMATS = ["onnx", "tflite"]
NETWORKS = {
    "cnn": (SmallCnn, {"image": normal(6, 1, 8, 8)}, ["scores"]),
    "lstm": (Recurrent, {"x": normal(6, 6, 8)}, ["scores"]),
    "tokens": (TokenClassifier, {"tokens": np.arange(48).reshape(6, 8) % 100}, ["scores"]),
    "sides": (TwoSided, {"vector": normal(6, 5), "image": normal(6, 3, 8, 8)}, ["spare", "map", "score", "choice"]),
}
CASES = [
    *((name, kind, None) for name in NETWORKS for kind in FORMATS),
    *(("cnn", kind, Quantize()) for kind in FORMATS),
    ("cnn", "onnx", Quantize(operators="qoperator", activations="uint8")),
    ("cnn", "tflite", Quantize("float16")),
    ("lstm", "onnx", Quantize("weight-only")),
    ("lstm", "tflite", Quantize("dynamic")),
    ("tokens", "onnx", Quantize("weight-only")),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            network, example, outputs = NETWORKS[name]
            made[name] = convert(seeded(network).eval(), example, outputs, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.mark.parametrize(("name", "kind", "rule"), CASES)
def test_a_file_without_names_is_smaller_and_answers_the_same_bits(converted, tmp_path, name, kind, rule):
    made = converted(name)
    example, file = made.example, made.files[kind]
    if rule is not None:
        file = quantize_file(file, [example], made.interface, tmp_path / f"q.{kind}", rule=rule)
    light = stripped(file, made.interface, example, tmp_path / f"light.{kind}")
    assert light.path == tmp_path / f"light.{kind}"
    assert light.path.stat().st_size < file.path.stat().st_size
    assert light.binding == file.binding
    before, after = predict_file(file, made.interface)(example), predict_file(light, made.interface)(example)
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}
    first, second = open_session(file.path, kind), open_session(light.path, kind)
    assert (second.inputs, second.outputs) == (first.inputs, first.outputs)
    content = light.path.read_bytes()
    assert not any(word in content for word in (b"outrider", b"litert_torch", b"PositionalModule", b".weight"))


def test_a_file_that_cannot_be_stripped_stays_as_it_is_and_says_why(converted, tmp_path, monkeypatch, caplog):
    from outrider_exporters.convert import strip

    made = converted("cnn")
    file, light = made.files["onnx"], tmp_path / "light.onnx"

    def wrong(content):
        model = onnx.load_from_string(strip.strip_onnx(content))
        model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
        return model.SerializeToString()

    def broken(content):
        return content[:64]

    def failing(content):
        raise ValueError("no")

    for stripper in (wrong, broken, failing):
        monkeypatch.setitem(strip._STRIPPERS, "onnx", stripper)
        with caplog.at_level(logging.WARNING):
            assert stripped(file, made.interface, made.example, light) is file
        assert "keeps its names and notes" in caplog.text
        assert not light.exists()
        caplog.clear()
