"""Interface to file and back. The session here is a real one of the protocol, in numpy, with a file's habits."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes.bound import BoundSession, input_converter, output_converter
from outrider_runtimes.engines import FileTensor
from outrider_runtimes.errors import DtypeError, InferenceError, InputError, ModelLoadError, ShapeError
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec


class NumpySession:
    """Applies a function to the file's arrays, after refusing what an engine would refuse."""

    def __init__(self, inputs, outputs, function):
        self.inputs, self.outputs = inputs, outputs
        self.input_names = [tensor.name for tensor in inputs]
        self.output_names = [tensor.name for tensor in outputs]
        self.calls, self.closed, self._function = 0, False, function

    def run(self, inputs):
        self.calls += 1
        for tensor, array in zip(self.inputs, inputs, strict=True):
            assert array.dtype.name == tensor.dtype
            assert array.flags.c_contiguous
            assert len(array.shape) == len(tensor.shape)
            assert all(w is None or w == s for w, s in zip(tensor.shape, array.shape, strict=True))
        outputs = self._function(*inputs)
        assert [o.dtype.name for o in outputs] == [tensor.dtype for tensor in self.outputs]
        return outputs

    def close(self):
        self.closed = True


def file(name, shape, dtype="float32"):
    return FileTensor(name=name, dtype=dtype, shape=shape)


def spec(name, shape, axes="", dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape, axes=axes)


def bind(name, file_name, shape, dtype="float32", **more):
    return TensorBinding(name=name, file_name=file_name, dtype=dtype, shape=shape, **more)


def one_to_one(interface_in, bound_in, interface_out, bound_out, function):
    session = NumpySession(
        [file(bound_in.file_name, bound_in.shape, bound_in.dtype)],
        [file(bound_out.file_name, bound_out.shape, bound_out.dtype)],
        function,
    )
    interface = Interface(inputs=(interface_in,), outputs=(interface_out,))
    return session, BoundSession(session, interface, Binding(inputs=(bound_in,), outputs=(bound_out,)))


def test_permutation_both_ways():
    _, bound = one_to_one(
        spec("image", (None, 3, 4, 5), "NCHW"),
        bind("image", "x", (None, 4, 5, 3), permutation=(0, 2, 3, 1)),
        spec("mask", (None, 3, 4, 5), "NCHW"),
        bind("mask", "y", (None, 4, 5, 3), permutation=(0, 2, 3, 1)),
        lambda x: [x * 2],
    )
    image = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    mask = bound.run({"image": image}).outputs["mask"]
    assert np.array_equal(mask, image * 2)
    assert mask.flags.c_contiguous


def test_tensors_are_found_by_name_whatever_the_files_order():
    session = NumpySession(
        [file("in2", (2,)), file("in1", (3,))],
        [file("unused", (1,)), file("out2", (2,)), file("out1", (3,))],
        lambda b, a: [np.zeros(1, np.float32), b + 1, a + 2],
    )
    interface = Interface(inputs=(spec("a", (3,)), spec("b", (2,))), outputs=(spec("A", (3,)), spec("B", (2,))))
    binding = Binding(
        inputs=(bind("a", "in1", (3,)), bind("b", "in2", (2,))),
        outputs=(bind("A", "out1", (3,)), bind("B", "out2", (2,))),
    )
    answer = BoundSession(session, interface, binding).run({"b": np.zeros(2, np.float32), "a": np.ones(3, np.float32)})
    assert np.array_equal(answer.outputs["A"], [3, 3, 3])
    assert np.array_equal(answer.outputs["B"], [1, 1])
    assert list(answer.outputs) == ["A", "B"]


def test_a_binding_to_a_tensor_that_the_file_lacks_is_refused():
    session = NumpySession([file("x", (1,))], [file("y", (1,))], lambda x: [x])
    interface = Interface(inputs=(spec("a", (1,)),), outputs=(spec("b", (1,)),))
    good_in, good_out = bind("a", "x", (1,)), bind("b", "y", (1,))
    for wrong in (
        Binding(inputs=(bind("a", "nope", (1,)),), outputs=(good_out,)),
        Binding(inputs=(good_in,), outputs=(bind("b", "nope", (1,)),)),
    ):
        with pytest.raises(ModelLoadError, match="nope"):
            BoundSession(session, interface, wrong)


def test_an_input_of_the_file_that_nothing_binds_is_refused():
    session = NumpySession([file("x", (1,)), file("more", (1,))], [file("y", (1,))], lambda x, m: [x])
    interface = Interface(inputs=(spec("a", (1,)),), outputs=(spec("b", (1,)),))
    with pytest.raises(ModelLoadError, match="more"):
        BoundSession(session, interface, Binding(inputs=(bind("a", "x", (1,)),), outputs=(bind("b", "y", (1,)),)))


def test_quantized_inputs_and_outputs():
    def on_int8(x):
        return [(-x.astype(np.int16)).clip(-128, 127).astype(np.int8)]

    _, bound = one_to_one(
        spec("x", (None, 4), "NC"),
        bind("x", "q", (1, 4), "int8", scale=0.5, zero_point=0),
        spec("y", (None, 4), "NC"),
        bind("y", "r", (1, 4), "int8", scale=0.25, zero_point=-4),
        on_int8,
    )
    y = bound.run({"x": np.array([[0.0, 1.0, -1.26, 1000.0]], np.float32)}).outputs["y"]
    stored = np.array([0, -2, 3, -127])
    assert y.dtype == np.float32
    assert np.array_equal(y, ((stored + 4) * 0.25)[None])


@pytest.mark.parametrize("value", [-(2**31) - 1, 2**31])
def test_int64_to_int32_refuses_what_does_not_fit(value):
    session, bound = one_to_one(
        spec("ids", (None,), "N", "int64"),
        bind("ids", "i", (None,), "int32"),
        spec("out", (None,), "N", "int64"),
        bind("out", "o", (None,), "int32"),
        lambda i: [i],
    )
    fits = np.array([-(2**31), 0, 2**31 - 1], np.int64)
    out = bound.run({"ids": fits}).outputs["out"]
    assert out.dtype == np.int64
    assert np.array_equal(out, fits)
    calls = session.calls
    with pytest.raises(InferenceError, match="'ids'"):
        bound.run({"ids": np.array([value], np.int64)})
    assert session.calls == calls
    assert bound.run({"ids": fits[:0]}).outputs["out"].shape == (0,)


def fixed_batch(rows):
    """y = 2x row by row, and a scalar that has no batch axis; the file takes ``rows`` rows at once."""
    session = NumpySession(
        [file("x", (rows, 2))],
        [file("y", (rows, 2)), file("k", (1,))],
        lambda x: [x * 2, np.ones(1, np.float32)],
    )
    interface = Interface(inputs=(spec("x", (None, 2), "NC"),), outputs=(spec("y", (None, 2), "NC"), spec("k", (1,))))
    binding = Binding(inputs=(bind("x", "x", (rows, 2)),), outputs=(bind("y", "y", (rows, 2)), bind("k", "k", (1,))))
    return session, BoundSession(session, interface, binding)


@pytest.mark.parametrize(("fixed", "rows", "calls"), [(1, 1, 1), (1, 5, 5), (2, 2, 1), (2, 6, 3), (1, 0, 1), (2, 0, 1)])
def test_a_fixed_batch_is_run_as_often_as_needed(fixed, rows, calls):
    session, bound = fixed_batch(fixed)
    x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    outputs = bound.run({"x": x}).outputs
    assert np.array_equal(outputs["y"], x * 2)
    assert outputs["y"].shape == (rows, 2)
    assert np.array_equal(outputs["k"], [1])
    assert session.calls == calls


def test_rows_that_do_not_fill_a_fixed_batch_are_refused():
    _, bound = fixed_batch(2)
    with pytest.raises(InferenceError, match="multiple"):
        bound.run({"x": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_fixed_batch_that_is_not_the_files_first_axis(rows):
    """A recurrent file is often time-major: [T, N, C] for the interface's [N, T, C]."""
    session, bound = one_to_one(
        spec("x", (None, 5, 2), "NTC"),
        bind("x", "x", (5, 1, 2), permutation=(1, 0, 2)),
        spec("y", (None, 5, 2), "NTC"),
        bind("y", "y", (5, 1, 2), permutation=(1, 0, 2)),
        lambda x: [np.cumsum(x, axis=0, dtype=np.float32)],
    )
    x = np.random.default_rng(1).standard_normal((rows, 5, 2)).astype(np.float32)
    y = bound.run({"x": x}).outputs["y"]
    assert y.shape == x.shape
    np.testing.assert_allclose(y, np.cumsum(x, axis=1), rtol=1e-5)
    assert session.calls == max(rows, 1)


def test_bad_inputs_run_nothing_and_the_next_call_is_unaffected():
    session, bound = fixed_batch(1)
    good = np.ones((1, 2), np.float32)
    before = bound.run({"x": good}).outputs["y"]
    for error, bad in (
        (DtypeError, {"x": good.astype(np.float64)}),
        (ShapeError, {"x": np.ones((1, 3), np.float32)}),
        (InputError, {"x": good * np.nan}),
        (InputError, {}),
    ):
        with pytest.raises(error):
            bound.run(bad)
    assert session.calls == 1
    assert np.array_equal(bound.run({"x": good}).outputs["y"], before)


def test_check_then_execute_is_run():
    _, bound = fixed_batch(1)
    x = np.ones((2, 2), np.float32)
    answer = bound.execute(bound.check({"x": x}), check_ms=1000.0)
    assert np.array_equal(answer.outputs["y"], bound.run({"x": x}).outputs["y"])
    timing = answer.timing_ms
    assert timing.pre >= 1000.0
    assert timing.total >= timing.pre + timing.infer + timing.post


def test_calls_from_several_threads_run_one_after_the_other():
    inside, overlaps = [], []

    def function(x):
        inside.append(1)
        overlaps.append(len(inside))
        for _ in range(100):
            x = x + 0
        inside.pop()
        return [x]

    _, bound = one_to_one(spec("x", (2,)), bind("x", "x", (2,)), spec("y", (2,)), bind("y", "y", (2,)), function)
    x = np.zeros(2, np.float32)
    threads = [threading.Thread(target=lambda: [bound.run({"x": x}) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(overlaps) == 200
    assert max(overlaps) == 1


def test_close_closes_the_session():
    session, bound = fixed_batch(1)
    bound.close()
    assert session.closed


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
reals = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200)
@given(st.data())
def test_layout_is_numpys_transpose_and_comes_back(data):
    array = data.draw(shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=reals)))
    permutation = tuple(data.draw(st.permutations(range(array.ndim))))
    tensor = spec("t", array.shape)
    bound = bind("t", "f", tuple(array.shape[i] for i in permutation), permutation=permutation)
    inside = input_converter(tensor, bound)(array)
    assert inside.flags.c_contiguous
    assert np.array_equal(inside, np.transpose(array, permutation))
    assert np.array_equal(output_converter(tensor, bound)(inside), array)


@settings(max_examples=200)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=6), elements=reals),
    st.sampled_from(["int8", "uint8", "int16", "uint16", "int32"]),
    st.floats(2.0**-10, 2.0**10, width=32),
    st.integers(-128, 255),
)
def test_quantization_is_the_textbooks(array, dtype, scale, zero_point):
    limits = np.iinfo(dtype)
    zero_point = int(np.clip(zero_point, limits.min, limits.max))
    tensor = spec("t", array.shape)
    bound = bind("t", "f", array.shape, dtype, scale=scale, zero_point=zero_point)
    stored = input_converter(tensor, bound)(array)
    exact = np.clip(np.rint(array.astype(np.float64) / scale) + zero_point, limits.min, limits.max)
    assert stored.dtype == dtype
    # One step apart is allowed: the product with 1/scale in float32 may fall on the other side of a tie.
    step = np.maximum(1, np.abs(exact) * 2.0**-22)
    assert (np.abs(stored.astype(np.float64) - exact) <= step).all()
    back = output_converter(tensor, bound)(stored)
    assert back.dtype == np.float32
    wanted = (stored.astype(np.float64) - zero_point) * scale
    np.testing.assert_allclose(back, wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_quantizing_saturates_whatever_the_float(dtype):
    tensor = spec("t", (3,), dtype=dtype)
    bound = bind("t", "f", (3,), "int8", scale=0.001, zero_point=5)
    extreme = np.array([-np.finfo(dtype).max, 0, np.finfo(dtype).max], dtype)
    assert input_converter(tensor, bound)(extreme).tolist() == [-128, 5, 127]
