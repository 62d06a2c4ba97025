"""What is read out of the errors of converters and engines."""

from __future__ import annotations

import pytest

from outrider_exporters.convert.diagnose import diagnose
from outrider_exporters.known_gaps import DATA_DEPENDENT

LOWERING = """Lowering not found: aten._linalg_svd.default

While executing %_linalg_svd : [num_users=1] = call_function[target=torch.ops.aten._linalg_svd.default](args = (%x,))
Original traceback:
File "/home/me/private/net.py", line 12, in forward
    def forward(s,x): return s.f(s,x)
"""
DISPATCH = """Failed to convert the exported program to an ONNX model. \x1b[96mThis is step 3/3\x1b[0m

<class 'DispatchError'>: No ONNX function found for <OpOverload(op='prims.lgamma', overload='default')>. Failure
<class 'ConversionError'>: Error when translating node %lgamma : [num_users=1] = call_function[target=torch.ops.prims.\
lgamma.default](args = (%linear,), kwargs = {}). See the stack trace."""
GUARD = """Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).

The following call raised this error:
  File "/home/me/private/net.py", line 16, in forward
    if x.sum() > 0:

"""


def test_a_missing_lowering_names_operator_and_node():
    found = diagnose(RuntimeError(LOWERING), "tflite")
    assert (found.operator, found.node, found.who) == ("aten._linalg_svd.default", "_linalg_svd", "litert-torch")
    assert found.text == "litert-torch has no form of the operator aten._linalg_svd.default (node '_linalg_svd')"


def test_a_missing_onnx_function_is_found_through_the_chain():
    error = RuntimeError("outer")
    error.__cause__ = ValueError(DISPATCH)
    found = diagnose(error, "onnx")
    assert (found.operator, found.node, found.who) == ("prims.lgamma", "lgamma", "torch.onnx")


def test_a_condition_on_values_names_the_line_and_not_the_folder():
    found = diagnose(RuntimeError(GUARD), "onnx")
    assert found.operator == DATA_DEPENDENT
    assert found.place == "net.py:16 `if x.sum() > 0:`"
    assert "private" not in found.text


def test_what_an_engine_lacks_is_the_engines():
    found = diagnose(ValueError("Didn't find op for builtin opcode 'STABLEHLO_SORT' version '1'. An older"), "tflite")
    assert found.text == "LiteRT has no form of the operator STABLEHLO_SORT"


@pytest.mark.parametrize("text", ["something odd\nand more", "\n\n something odd \x1b[96m"])
def test_anything_else_is_quoted_in_one_line(text):
    assert diagnose(RuntimeError(text), "onnx").text == "torch.onnx said: something odd"
    assert diagnose(RuntimeError(""), "onnx").text == "torch.onnx said: RuntimeError"


def test_errors_that_cause_each_other_end():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert diagnose(first, "onnx").said == "b"
