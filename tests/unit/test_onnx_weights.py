from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper

from outrider_exporters.convert.onnx_weights import (
    FEWEST_ELEMENTS,
    INT8_MAX,
    quantize_symmetric,
    split_gemm,
    store_float16,
    store_int8,
)
from support.models import onnx_model

rng = np.random.default_rng(4)
weights = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=3), elements=st.floats(-1e3, 1e3, width=32)
)


def draw(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def run(model, **inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def single(kind, x_shape, y_shape, tensors, inputs=None, **options):
    """A model of one operator and its input; the operator's name is `op`."""
    names = inputs or ["x", *tensors]
    node = helper.make_node(kind, names, ["y"], name="op", **options)
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    return onnx_model([node], [("x", "float32", x_shape)], [("y", "float32", y_shape)], stored)


def recurrent(kind: str, gates: int):
    options = {"hidden_size": 8, **({"linear_before_reset": 1} if kind == "GRU" else {})}
    tensors = {"w": draw(1, gates * 8, 16), "r": draw(1, gates * 8, 8), "b": draw(1, gates * 16)}
    return single(kind, [4, 2, 16], [4, 1, 2, 8], tensors, **options), draw(4, 2, 16)


CASES = {
    "Conv": lambda: (
        single("Conv", [1, 3, 8, 8], [1, 6, 6, 6], {"w": draw(6, 3, 3, 3), "b": draw(6)}),
        draw(1, 3, 8, 8),
    ),
    "ConvTranspose": lambda: (
        single("ConvTranspose", [1, 6, 4, 4], [1, 4, 8, 8], {"w": draw(6, 4, 2, 2)}, strides=[2, 2]),
        draw(1, 6, 4, 4),
    ),
    "MatMul": lambda: (single("MatMul", [2, 10], [2, 12], {"w": draw(10, 12)}), draw(2, 10)),
    "Gemm": lambda: (single("Gemm", [2, 10], [2, 12], {"w": draw(12, 10), "b": draw(12)}, transB=1), draw(2, 10)),
    "RNN": lambda: recurrent("RNN", 1),
    "GRU": lambda: recurrent("GRU", 3),
    "LSTM": lambda: recurrent("LSTM", 4),
}


@given(weights, st.booleans(), st.data())
def test_a_weight_is_wrong_by_half_a_step_at_most(weight, per_channel, data):
    axis = data.draw(st.integers(-weight.ndim, weight.ndim - 1)) if per_channel else None
    stored, scale = quantize_symmetric(weight, axis)
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
        assert scale.shape == (weight.shape[axis],)
    step = scale.astype(np.float64).reshape(shape) if axis is not None else float(scale)
    assert stored.dtype == np.int8 and stored.shape == weight.shape and abs(stored.astype(int)).max() <= INT8_MAX
    assert (np.abs(stored * step - weight) <= step * 0.5001 + 1e-30).all()
    assert not stored[weight == 0].any()


@given(weights)
def test_no_channel_has_a_coarser_step_than_the_whole(weight):
    _, whole = quantize_symmetric(weight, None)
    _, channels = quantize_symmetric(weight, 0)
    assert (channels[np.abs(weight).reshape(len(weight), -1).max(1) > 0] <= whole).all()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_operator_with_weights_takes_them_from_int8(kind, per_channel):
    model, x = CASES[kind]()
    exact = run(model, x=x)
    store_int8(model, per_channel=per_channel, kept=())
    wrong = np.abs(run(model, x=x) - exact).max() / np.ptp(exact)
    assert 0 < wrong < 0.05
    assert not [w.name for w in model.graph.initializer if w.data_type == 1 and w.name in ("w", "r")]
    assert sum(len(w.raw_data) for w in model.graph.initializer if w.name.endswith("_int8")) >= FEWEST_ELEMENTS


@pytest.mark.parametrize("kind", CASES)
def test_the_axis_is_that_of_the_output_channels(kind):
    """Channels of very different size: one scale for all would lose the small ones, and so would another axis."""
    model, _ = CASES[kind]()
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 0}.get(kind, 1)
    (weight,) = (w for w in model.graph.initializer if w.name == "w")
    array = numpy_helper.to_array(weight).copy()
    shape = [1] * array.ndim
    shape[axis] = -1
    array *= np.logspace(-4, 0, array.shape[axis], dtype=np.float32).reshape(shape)
    weight.CopyFrom(numpy_helper.from_array(array, "w"))
    store_int8(model, per_channel=True, kept=())
    parts = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    np.testing.assert_allclose(parts["w_int8"] * parts["w_scale"], array, atol=0, rtol=2.0)
    assert parts["w_scale"].size == array.shape[axis]


@pytest.mark.parametrize("kind", CASES)
def test_float16_is_exact_to_three_digits(kind):
    model, x = CASES[kind]()
    exact = run(model, x=x)
    store_float16(model, kept=())
    assert 0 < np.abs(run(model, x=x) - exact).max() / np.ptp(exact) < 2e-3


def test_a_weight_that_float16_cannot_hold_stays():
    model = single("MatMul", [2, 10], [2, 12], {"w": np.full((10, 12), 1e5, np.float32)})
    before = model.SerializeToString()
    store_float16(model, kept=())
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "store", [lambda m, kept: store_int8(m, per_channel=True, kept=kept), lambda m, kept: store_float16(m, kept=kept)]
)
def test_kept_operators_and_small_weights_stay(store):
    model, _ = CASES["Conv"]()
    before = model.SerializeToString()
    store(model, kept=["op"])
    assert model.SerializeToString() == before
    small = single("MatMul", [2, 3], [2, 4], {"w": draw(3, 4)})
    before = small.SerializeToString()
    store(small, kept=[])
    assert small.SerializeToString() == before


def test_an_embedding_and_a_weight_behind_a_transpose():
    ids = np.array([[1, 5, 7]], np.int64)
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["rows"], name="gather"),
        helper.make_node("Transpose", ["table"], ["turned"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"], name="product"),
    ]
    table = draw(12, 8)

    def make():
        tensors = [numpy_helper.from_array(table, "table")]
        return onnx_model(nodes, [("x", "int64", [1, 3])], [("y", "float32", [1, 3, 12])], tensors)

    model = make()
    exact = run(model, x=ids)
    store_int8(model, per_channel=True, kept=())
    assert {w.name for w in model.graph.initializer} == {"table_int8", "table_scale"}
    assert np.abs(run(model, x=ids) - exact).max() / np.ptp(exact) < 0.02
    for kept in ("gather", "turn", "product"):  # whoever shares the weight keeps it
        other = make()
        store_int8(other, per_channel=True, kept=[kept])
        assert [w.name for w in other.graph.initializer] == ["table"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_in_two_gives_the_same(bias, transposed):
    tensors = {"w": draw(12, 10) if transposed else draw(10, 12), **({"b": draw(12)} if bias else {})}
    model, x = single("Gemm", [2, 10], [2, 12], tensors, transB=transposed), draw(2, 10)
    exact = run(model, x=x)
    split_gemm(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"][: 1 + bias]
    assert model.graph.node[0].name == "op"
    np.testing.assert_allclose(run(model, x=x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
def test_another_gemm_is_left_alone(options):
    shape = [10, 2] if options.get("transA") else [2, 10]
    model = single("Gemm", shape, [2, 12], {"w": draw(10, 12), "b": draw(12)}, **options)
    before = model.SerializeToString()
    split_gemm(model)
    assert model.SerializeToString() == before
