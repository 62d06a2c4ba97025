from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.convert.trained import Trained, TrainedTensor, check_scales, ranges_of, scale_of
from outrider_runtimes.errors import ExportError

ROWS = 3


def drawn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, *shape)).astype(np.float32)


def learned(**tensors: tuple[np.ndarray, tuple[float, float]]) -> Trained:
    """By label: what a tensor holds in every row, and its range."""
    return Trained(
        inputs={},
        per_channel=True,
        tensors=tuple(
            TrainedTensor(label=label, bounds=bounds, values=np.sort(values.reshape(ROWS, -1), axis=1))
            for label, (values, bounds) in tensors.items()
        ),
    )


def runs(**tensors: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{name: values[at : at + 1] for name, values in tensors.items()} for at in range(ROWS)]


@given(st.permutations([1, 2, 3]), st.floats(0.1, 100.0), st.integers(0, 1000))
def test_a_tensor_is_known_in_any_layout(order, factor, seed):
    image, other = drawn(2, 3, 4, seed=seed) * np.float32(factor), drawn(24, seed=seed + 1)
    turned = np.transpose(image, (0, *order)) * np.float32(1 + 1e-6)  # as another engine computes it
    trained = learned(first=(image, (-1.0, 2.0)), second=(other, (0.0, 5.0)))
    assert ranges_of(trained, runs(x=turned, y=other.reshape(ROWS, 4, 6))) == {"x": (-1.0, 2.0), "y": (0.0, 5.0)}


def test_a_tensor_that_the_network_does_not_have_gets_what_it_spans():
    known, stranger = drawn(6, seed=0), np.abs(drawn(6, seed=1))
    almost = known.copy()
    almost[2] = drawn(6, seed=3)[2]  # other values in one of the rows
    found = ranges_of(learned(a=(known, (-9.0, 9.0))), runs(known=known, stranger=stranger, almost=almost))
    assert found["known"] == (-9.0, 9.0)
    assert found["stranger"] == (0.0, float(stranger.max()))
    assert found["almost"] == (float(almost.min()), float(almost.max()))


def test_of_tensors_that_hold_the_same_the_widest_range_is_taken():
    values = drawn(5, seed=0)
    trained = learned(a=(values, (-1.0, 1.0)), b=(values, (0.0, 3.0)), c=(values, (-0.5, 0.5)))
    assert ranges_of(trained, runs(x=values)) == {"x": (0.0, 3.0)}


def test_dead_tensors_and_empty_ones():
    trained = learned(dead=(np.zeros((ROWS, 4), np.float32), (0.0, 0.0)))
    found = ranges_of(trained, runs(dead=np.zeros((ROWS, 4), np.float32), none=np.zeros((ROWS, 0), np.float32)))
    assert found == {"dead": (0.0, 0.0), "none": (0.0, 0.0)}


def test_a_scale_that_was_not_trained_is_refused_by_the_tensor_s_name():
    trained = learned(a=(drawn(4, seed=0), (-1.0, 1.55)))
    assert scale_of((-1.0, 1.55)) == pytest.approx(0.01)
    check_scales(trained, {"a": float(np.float32(0.01)), "sigmoid": 1 / 256, "tanh": 1 / 128}, "the onnx file")
    with pytest.raises(ExportError, match=r"the onnx file rounds tensor 'b' to steps of 0\.0101"):
        check_scales(trained, {"a": 0.01, "b": 0.0101}, "the onnx file")
