"""The table of networks: each learns, becomes ONNX and TFLite in float32 and int8, and is right on both engines."""

from __future__ import annotations

import pytest
import torch

from networks.recurrent import STEPS
from networks.running import FORMATS, Ran, run_case
from networks.table import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MAX_FLOAT_PARITY = 1e-4
FEWEST_ROWS = 1000
LEAST_SNR_DB = 10.0  # below, the metric holds by chance


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name)) for case in CASES],
)
def ran(request, tmp_path_factory) -> Ran:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = run_case(request.param, tmp_path_factory.mktemp(request.param.name))
    finally:
        torch.set_num_threads(threads)
    print(f"\n{result}")
    return result


def test_it_is_the_network_that_the_table_states(ran):
    case = ran.case
    assert ran.parameters == case.parameters, ran
    assert ran.baseline == pytest.approx(case.baseline, abs=0.03, rel=0.05), ran
    assert case.metric.better(case.floor, case.baseline), "the floor must be better than the baseline"
    assert ran.rows >= FEWEST_ROWS, ran


def test_it_learned_and_is_not_saturated(ran):
    case = ran.case
    for figure in (ran.torch, *(ran.variants[f"{f}-float32"].metric for f in FORMATS)):
        assert case.metric.better(figure, case.floor), ran
        assert case.metric.better(case.ceiling, figure), ran


def test_float32_answers_as_pytorch_does(ran):
    assert max(ran.variants[f"{f}-float32"].parity for f in FORMATS) <= MAX_FLOAT_PARITY, ran


@pytest.mark.parametrize("model_format", FORMATS)
def test_the_quantized_form_keeps_the_metric(ran, model_format):
    case = ran.case
    plain, small = (ran.variants[f"{model_format}-{form}"] for form in ("float32", case.forms[model_format]))
    assert case.metric.loss(plain.metric, small.metric) <= 1.0, ran
    assert (small.size_bytes < plain.size_bytes) is case.shrinks, ran
    assert small.snr_db > LEAST_SNR_DB, ran


@pytest.mark.parametrize("model_format", FORMATS)
def test_the_rows_can_tell_a_loss_of_one_point_from_noise(ran, model_format):
    variant = f"{model_format}-{ran.case.forms[model_format]}"
    assert not ran.case.metric.in_points or 2.0 * ran.loss_noise(variant) <= 1.0, ran


def test_the_bundle_says_what_beats_float32_with_the_figures(ran):
    for said in ran.said.values():
        text, tried = said.quantization["text"], said.quantization["tried"]
        sizes = {name: figures["size_bytes"] for name, figures in tried.items()}
        assert sizes == {name: ran.variants[name].size_bytes for name in sizes}
        assert all(f"{figures['latency_ms']:.3f} ms" in text for n, figures in tried.items() if "float32" not in n)
        least = min(size for name, size in sizes.items() if name.endswith("float32"))
        assert set(said.quantization["smaller"]) == {n for n, s in sizes.items() if s < least}
        assert bool(said.quantization["smaller"]) is ran.case.shrinks, ran
        none = not said.quantization["smaller"] and not said.quantization["faster"]
        assert text.startswith("no quantized form beats float32: ") is none
        assert text in said.inspected


def test_both_engines_ran(ran):
    assert {figures.engine for figures in ran.variants.values()} == {"onnxruntime", "litert"}, ran


def test_recurrent_layers_stay_one_operator_in_onnx(ran):
    files = [figures for figures in ran.variants.values() if figures.variant.startswith("onnx")]
    assert all(ran.case.keeps in {"", *figures.operators} for figures in files), files


def test_recurrent_layers_are_unrolled_in_tflite(ran):
    """A matrix product a step at least, and no operator that is a sequence or a loop of its own."""
    for figures in ran.variants.values():
        if figures.variant.startswith("tflite") and ran.case.keeps:
            assert not [name for name in figures.operators if "SEQUENCE" in name or name in ("WHILE", "LSTM", "RNN")]
            assert figures.operators["FULLY_CONNECTED"] + figures.operators["BATCH_MATMUL"] >= STEPS, figures


def test_the_table_has_every_item_of_the_list():
    assert {case.item for case in CASES} == set(range(1, 13))
    assert len({case.name for case in CASES}) == len(CASES)
