"""The list of known gaps as rules, and how errors of the tools are read. What really fails is in test_gaps_shown."""

from __future__ import annotations

import pytest

from outrider_exporters.known_gaps import ANY_PRECISION, BOTH, DATA_DEPENDENT, KNOWN_GAPS, bare_name, find_gap


def test_every_entry_says_what_where_why_and_what_instead():
    assert len({gap.network for gap in KNOWN_GAPS}) == len(KNOWN_GAPS)
    for gap in KNOWN_GAPS:
        assert gap.formats and set(gap.formats) <= set(BOTH)
        assert gap.precisions and set(gap.precisions) <= set(ANY_PRECISION)
        assert gap.operators and all(gap.operators)
        assert all(
            text and text == text.strip() and "\n" not in text for text in (gap.network, gap.reason, gap.instead)
        )


def test_the_more_special_entry_comes_first():
    special = find_gap("onnx", "float32", operators={DATA_DEPENDENT}, layers={"Transformer", "Linear"})
    general = find_gap("onnx", "float32", operators={DATA_DEPENDENT}, layers={"Linear"})
    assert special is not None and "is_causal=True" in special.instead
    assert general is not None and "torch.where" in general.instead


def test_no_entry_is_hidden_behind_another():
    for gap in KNOWN_GAPS:
        for model_format in gap.formats:
            for operator in gap.operators:
                found = find_gap(model_format, gap.precisions[0], operators={operator}, layers=set(gap.layers))
                assert found is gap


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("aten._linalg_svd.default", "_linalg_svd"),
        ("prims.lgamma", "lgamma"),
        ("torch.ops.aten.nonzero.default", "nonzero"),
        ("aten::cdist", "cdist"),
        ("STABLEHLO_SORT", "STABLEHLO_SORT"),
        ("GRU", "GRU"),
        ("", ""),
    ],
)
def test_operators_are_known_by_their_bare_names(operator, name):
    assert bare_name(operator) == name


def test_another_format_precision_or_operator_is_no_gap():
    assert find_gap("tflite", "int8", operators={"GRU"}) is None
    assert find_gap("onnx", "weight-only", operators={"GRU"}) is None
    assert find_gap("onnx", "int8", operators={"Conv", "GRU"}) is not None
    assert find_gap("onnx", "float32", operators={"Conv"}) is None
    assert find_gap("onnx", "float32", operators=set()) is None
