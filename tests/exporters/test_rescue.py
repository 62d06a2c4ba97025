"""A network with a channel that is 300 times the others: int8 fails, and only both neighbours in float restore it."""

from __future__ import annotations

import numpy as np
import pytest

from outrider_exporters import Quantize
from outrider_exporters.convert import predict_file
from outrider_exporters.convert.quantize import quantize_file
from outrider_exporters.convert.rescue import losers_of, rescue
from outrider_runtimes.errors import ConfigError
from support.converted import Converted, convert
from support.networks import digits
from support.outlier import TRAIN_ROWS, planted, trained

pytestmark = pytest.mark.slow

FORMATS = ["onnx", "tflite"]


@pytest.fixture(scope="module")
def outlier(tmp_path_factory) -> Converted:
    images, _ = digits()
    return convert(planted(trained()), {"image": images[:64]}, ["logits"], tmp_path_factory.mktemp("outlier"))


def accuracy(made: Converted, file) -> float:
    images, targets = digits()
    given = predict_file(file, made.interface)({"image": images[TRAIN_ROWS:]})["logits"]
    return float((given.argmax(-1) == targets[TRAIN_ROWS:]).mean())


@pytest.mark.parametrize("model_format", FORMATS)
def test_an_outlier_is_found_and_kept_in_float(outlier, tmp_path, model_format):
    source, calibration = outlier.files[model_format], [outlier.example]
    exact = accuracy(outlier, source)

    def holds(file) -> bool:
        return accuracy(outlier, file) >= exact - 0.01

    def quantized(*names: str):
        path = tmp_path / "by-hand"
        rule = Quantize(keep_float=names)
        return quantize_file(source, calibration, outlier.interface, path, rule=rule)

    assert exact > 0.9
    assert not holds(quantized())
    assert not holds(quantized("first"))  # either alone leaves the tensor between them in int8
    assert not holds(quantized("second"))
    assert holds(quantized("first", "second"))

    trials = []
    found = rescue(
        source,
        calibration,
        outlier.interface,
        tmp_path / "q",
        holds=holds,
        on_trial=lambda *trial: trials.append(trial),
    )
    assert found is not None
    assert {loser.label for loser in found.kept} == {"first", "second"}
    assert [(done, total) for done, total, _ in trials] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert holds(found.file)
    assert found.file.path == tmp_path / "q"
    assert found.file.scheme.endswith("-mixed")
    assert "first" in found.text and "second" in found.text
    again = quantize_file(source, calibration, outlier.interface, tmp_path / "again", rule=found.rule)
    assert again.path.read_bytes() == found.file.path.read_bytes()  # the rule says it all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "by-hand", "q"]


@pytest.mark.parametrize("model_format", FORMATS)
def test_a_bound_out_of_reach_leaves_nothing_behind(outlier, tmp_path, model_format):
    source = outlier.files[model_format]
    asked = []
    assert rescue(source, [outlier.example], outlier.interface, tmp_path / "q", holds=asked.append) is None
    assert asked
    assert list(tmp_path.iterdir()) == []


def test_what_the_rule_keeps_stays_and_does_not_lose(outlier):
    rule = Quantize(keep_float=("first", "second"), observer="percentile")
    losers = losers_of(outlier.files["onnx"], [outlier.example], outlier.interface, rule=rule)
    assert {loser.label for loser in losers} == {"stem", "first", "second", "last", "head"}
    assert max(loser.error for loser in losers) < 0.1
    with pytest.raises(ConfigError, match="no layer 'frist'"):
        losers_of(outlier.files["onnx"], [outlier.example], outlier.interface, rule=Quantize(keep_float=("frist",)))


def test_the_observers_differ_where_there_is_an_outlier(outlier, tmp_path):
    """Cutting the outlier off is no way out here: the channel carries what the network knows."""
    source = outlier.files["onnx"]
    sizes = {}
    for observer in ("min-max", "percentile", "mse"):
        file = quantize_file(
            source, [outlier.example], outlier.interface, tmp_path / observer, rule=Quantize(observer=observer)
        )
        sizes[observer] = accuracy(outlier, file)
    assert max(sizes.values()) < accuracy(outlier, source) - 0.01
    assert np.ptp(list(sizes.values())) > 0.0
