"""Which tests go along to an emulated board: by what they import, less a written list."""

from __future__ import annotations

import pytest

from boards.selection import DESELECTED, LEFT_OUT, TESTS, device_tests

ENGINES = ("onnxruntime", "ai_edge_litert", "flatbuffers")


@pytest.mark.slow  # reads every test file
def test_the_device_rooms_tests_go_and_the_workstations_stay():
    found = device_tests(ENGINES)
    assert {"conformance/test_engines.py", "unit/test_tensors.py", "unit/test_spool.py", "unit/test_board.py"} <= {
        *found
    }
    assert not [name for name in found if "recipe" in name or "rehearse" in name or "quantize" in name]
    assert "conformance/test_external_data.py" not in found  # imports onnx
    assert len(found) == len(set(found)) >= 30


@pytest.mark.slow
def test_what_a_board_has_decides():
    assert set(device_tests(())) <= set(device_tests(ENGINES)) <= set(device_tests((*ENGINES, "onnx")))
    assert "unit/test_admit.py" in {*device_tests((*ENGINES, "onnx"))} - {*device_tests(ENGINES)}


@pytest.mark.parametrize("name", [*LEFT_OUT, *DESELECTED])
def test_what_is_left_out_is_still_there(name):
    file, _, function = name.partition("::")
    assert f"def {function}" in (TESTS / file).read_text()
    assert {**LEFT_OUT, **DESELECTED}[name]
