from __future__ import annotations

import numpy as np
import pytest

from outrider.bundle import GoldenTensor
from outrider_exporters.golden import LOOSEST_SHARE, TOLERANCE_SHARE, build_golden, tolerances
from outrider_runtimes.errors import ExportError, ShapeError
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Interface, TensorSpec

pytestmark = pytest.mark.slow

INTERFACE = Interface(
    inputs=(TensorSpec(name="Eingabe x", dtype="float32", shape=(None, 4), axes="NC"),),
    outputs=(
        TensorSpec(name="logits", dtype="float32", shape=(None, 4), axes="NC"),
        TensorSpec(name="class", dtype="int64", shape=(None,), axes="N"),
    ),
)
X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def answers(scale: float, noise: float = 0.0):
    def predict(inputs):
        logits = (inputs["Eingabe x"] * scale + noise).astype(np.float32)
        return {"class": logits.argmax(-1), "logits": logits}

    return predict


def build(variants, *, decision=None, inputs=X, reference=None):
    return build_golden(
        INTERFACE,
        {"Eingabe x": inputs},
        reference or answers(1.0),
        variants,
        precisions={name: name.split("-")[1] for name in variants},
        decision=decision,
    )


def read(members: dict[str, bytes], tensor: GoldenTensor) -> np.ndarray:
    return np.frombuffer(members[tensor.member], np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


def test_what_was_answered_is_stored():
    golden, members = build({"onnx-float32": answers(1.0), "tflite-int8": answers(1.1)})
    assert golden.rows == 6
    np.testing.assert_array_equal(read(members, golden.inputs["Eingabe x"]), X)
    np.testing.assert_array_equal(read(members, golden.reference["logits"]), X)
    np.testing.assert_array_equal(read(members, golden.variants["tflite-int8"]["logits"]), (X * 1.1).astype(np.float32))
    np.testing.assert_array_equal(read(members, golden.variants["tflite-int8"]["class"]), X.argmax(-1))
    assert list(golden.reference) == ["logits", "class"]
    assert golden.decision == DecisionCheck()


def test_every_tensor_has_a_member_of_its_own_and_a_plain_path():
    golden, members = build({"onnx-float32": answers(1.0)})
    used = [tensor.member for tensor in golden.tensors()]
    assert sorted(used) == sorted(members)
    assert all(path.startswith("golden/") and path.islower() and " " not in path for path in used)
    assert all(len(members[tensor.member]) == tensor.size_bytes for tensor in golden.tensors())


def test_the_tolerance_is_a_share_of_the_variants_own_range():
    golden, _ = build({"onnx-float32": answers(1.0), "tflite-int8": answers(1.0)})
    spread = float(np.ptp(X))
    assert golden.tolerance["onnx-float32"]["logits"] == pytest.approx(spread * 1e-3)
    assert golden.tolerance["tflite-int8"]["logits"] == pytest.approx(spread * 0.05)


def test_tolerances_of_unusual_outputs():
    one = tolerances({"flat": np.zeros((2, 2), np.float32), "ids": np.int64([3, 9]), "flag": np.array([True])}, "int8")
    assert one == {"flat": 0.05, "ids": 6.0, "flag": 1.0}
    assert tolerances({"y": np.float32([0, 1])}, "int4") == {"y": LOOSEST_SHARE}
    assert max(TOLERANCE_SHARE.values()) == LOOSEST_SHARE


def test_a_variant_that_would_be_refused_by_every_board_is_refused_here():
    decision = DecisionCheck(kind="argmax", output="logits", axis=-1, min_agreement=0.95)
    golden, _ = build({"onnx-float32": answers(2.0)}, decision=decision)
    assert golden.decision == decision
    with pytest.raises(ExportError, match=r"variant 'tflite-int8' fails its own golden: .* decisions"):
        build({"onnx-float32": answers(1.0), "tflite-int8": answers(-1.0)}, decision=decision)


def test_answers_must_be_finite():
    with pytest.raises(ExportError, match="variant 'onnx-float32' gives NaN or infinite values in 'logits'"):
        build({"onnx-float32": answers(1.0, np.nan)})
    with pytest.raises(ExportError, match="the reference gives NaN or infinite"):
        build({"onnx-float32": answers(1.0)}, reference=answers(np.inf))


def test_golden_inputs_of_another_shape_or_of_no_row_are_refused():
    with pytest.raises(ShapeError):
        build({"onnx-float32": answers(1.0)}, inputs=X[:, :3])
    with pytest.raises(ExportError, match="one row"):
        build({"onnx-float32": answers(1.0)}, inputs=X[:0])
