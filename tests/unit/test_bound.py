"""Interface to file and back. The session here is a real one of the protocol, in numpy, with a file's habits."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes.bound import BoundSession, input_converter, output_converter
from outrider_runtimes.engines import FileTensor
from outrider_runtimes.errors import DtypeError, InferenceError, InputError, ModelLoadError, ShapeError
from outrider_runtimes.processing import Softmax, around
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from support.effort import effort


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


def test_close_waits_for_the_call_that_runs_and_closes_the_session():
    alive = []

    def function(x):
        closer.start()
        closer.join(0.05)
        alive.append(closer.is_alive() and not session.closed)
        return [x]

    session, bound = one_to_one(spec("x", (2,)), bind("x", "x", (2,)), spec("y", (2,)), bind("y", "y", (2,)), function)
    closer = threading.Thread(target=bound.close)
    bound.run({"x": np.zeros(2, np.float32)})
    closer.join(60)
    assert (alive, session.closed) == ([True], True)


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
reals = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=effort(200))
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


@settings(max_examples=effort(200))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brighten:
    """A step before: float32 = uint8 / 255 + bias. It refuses an image that is all black."""

    kind: ClassVar[str] = "brighten"
    tensor: str = "x"
    bias: float = 0.0
    log: list = dataclasses.field(default_factory=list)

    def specs(self, specs, callers):
        return {
            name: dataclasses.replace(s, dtype="float32") if name == self.tensor else s for name, s in specs.items()
        }

    def apply(self, tensors, shapes):
        begun = time.perf_counter_ns()
        x = tensors[self.tensor]
        if not x.any():
            raise InputError("the image is black", tensor=self.tensor, hint="take off the lid")
        out = x.astype(np.float32) / np.float32(255) + np.float32(self.bias)
        self.log.append(time.perf_counter_ns() - begun)
        return {**tensors, self.tensor: out}

    def to_dict(self):
        return {"step": self.kind}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Brighten):
    """A step after: y + the caller's width. It refuses an answer whose first value is 2.0."""

    kind: ClassVar[str] = "shifted"
    tensor: str = "y"

    def specs(self, specs, callers):
        return dict(specs)

    def apply(self, tensors, shapes):
        begun = time.perf_counter_ns()
        y = tensors["y"]
        if (y[:, 0] == 2.0).any():
            raise InputError("an answer that cannot be", hint="another model")
        out = y + np.float32(shapes["x"][1])
        self.log.append(time.perf_counter_ns() - begun)
        return {"y": out}


def processed(before=(), after=(), *, fixed=1, finite="reject"):
    """y = 2x in a file that takes ``fixed`` rows, x from 0 to 100; the caller's x is uint8 where steps come before."""
    session = NumpySession([file("x", (fixed, 2))], [file("y", (fixed, 2))], lambda x: [x * 2])
    x = dataclasses.replace(spec("x", (None, 2), "NC"), range=(0.0, 100.0))
    network = Interface(inputs=(x,), outputs=(spec("y", (None, 2), "NC"),))
    callers = (dataclasses.replace(x, dtype="uint8" if before else "float32"),)
    interface = around(network, callers, before, after)
    binding = Binding(inputs=(bind("x", "x", (fixed, 2)),), outputs=(bind("y", "y", (fixed, 2)),))
    return session, BoundSession(session, interface, binding, finite=finite)


def test_steps_run_before_and_after_the_network():
    _, bound = processed([Brighten()], [Softmax(tensor="y")])
    x = np.array([[0, 255]], np.uint8)
    y = bound.run({"x": x}).outputs["y"]
    powers = np.exp([0.0, 2.0])
    np.testing.assert_allclose(y, [powers / powers.sum()], rtol=1e-6)
    assert y.dtype == np.float32
    assert bound.interface.inputs[0].dtype == "uint8"
    with pytest.raises(DtypeError, match="uint8"):
        bound.run({"x": x.astype(np.float32)})


def test_a_step_after_alone_leaves_the_callers_inputs_to_the_network():
    _, bound = processed(after=[Shifted()])
    assert bound.run({"x": np.array([[3.0, 4.0]], np.float32)}).outputs["y"].tolist() == [[8.0, 10.0]]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_over_a_fixed_batch_with_steps_around_it(rows):
    session, bound = processed([Brighten(bias=1.0)], [Shifted()])
    x = np.random.default_rng(2).integers(1, 256, (rows, 2), np.uint8)
    if not rows:
        with pytest.raises(InputError, match="black"):  # np.any of nothing
            bound.run({"x": x})
        return
    y = bound.run({"x": x}).outputs["y"]
    np.testing.assert_allclose(y, (x / 255 + 1) * 2 + 2, rtol=1e-6)
    assert session.calls == rows


def test_a_step_that_refuses_runs_nothing_and_the_next_call_is_bit_identical():
    session, bound = processed([Brighten(bias=0.3)], [Softmax(tensor="y")])
    good = np.array([[7, 255]], np.uint8)
    before = bound.run({"x": good}).outputs["y"].tobytes()
    with pytest.raises(InputError, match=r"step 0 \(brighten\): the image is black") as caught:
        bound.run({"x": good * 0})
    assert (caught.value.tensor, caught.value.hint) == ("x", "take off the lid")
    assert session.calls == 1
    assert bound.run({"x": good}).outputs["y"].tobytes() == before


def test_a_postprocessing_that_fails_is_an_inference_error_and_the_next_call_is_bit_identical():
    _, bound = processed(after=[Shifted()])
    good = np.array([[3.0, 4.0]], np.float32)
    before = bound.run({"x": good}).outputs["y"].tobytes()
    with pytest.raises(InferenceError, match=r"postprocessing: step 0 \(shifted\): an answer that cannot be"):
        bound.run({"x": np.array([[1.0, 4.0]], np.float32)})
    assert bound.run({"x": good}).outputs["y"].tobytes() == before


def test_steps_that_make_no_number_are_refused_or_passed():
    steps = [Brighten(bias=math.inf)]
    x = np.array([[1, 2]], np.uint8)
    session, bound = processed(steps)
    with pytest.raises(InputError, match="after preprocessing: input 'x' has NaN or infinite values"):
        bound.run({"x": x})
    assert session.calls == 0
    assert np.isinf(processed(steps, finite="pass")[1].run({"x": x}).outputs["y"]).all()
    assert processed(steps, finite="clip")[1].run({"x": x}).outputs["y"].tolist() == [[200.0, 200.0]]


def test_the_steps_count_in_the_timing():
    """Each step measures itself; what is measured around it cannot be less."""
    before, after = Brighten(), Shifted()
    _, bound = processed([before], [after])
    timing = bound.run({"x": np.array([[9, 9]], np.uint8)}).timing_ms
    assert timing.pre >= before.log[0] * 1e-6
    assert timing.post >= after.log[0] * 1e-6
    assert timing.total == pytest.approx(timing.pre + timing.queue + timing.infer + timing.post)
    assert timing.network == 0.0


BAD_CALLS = {
    "nan": lambda x: {"x": np.where(np.arange(2) == 1, np.nan, x).astype(np.float32)},
    "infinity": lambda x: {"x": x * np.float32(np.inf)},
    "dtype": lambda x: {"x": x.astype(np.float64)},
    "rank": lambda x: {"x": x[0]},
    "width": lambda x: {"x": np.repeat(x, 2, axis=1)},
    "rows": lambda x: {"x": np.vstack([x, x[:1]])},  # no multiple of the fixed batch
    "name": lambda x: {"z": x},
    "one more": lambda x: {"x": x, "z": x},
    "list": lambda x: {"x": x.tolist()},
    "no mapping": lambda x: x,
}


@settings(max_examples=effort(100), deadline=None)
@given(
    hnp.arrays(np.float32, (2, 2), elements=st.floats(1, 100, width=32)),
    st.lists(st.sampled_from(sorted(BAD_CALLS)), min_size=1, max_size=6),
)
def test_a_call_after_bad_calls_gives_the_same_bits(x, bad_calls):
    session, bound = fixed_batch(2)
    before = bound.run({"x": x}).outputs["y"].tobytes()
    for name in bad_calls:
        with pytest.raises((InputError, InferenceError)):
            bound.run(BAD_CALLS[name](x))
        assert bound.run({"x": x}).outputs["y"].tobytes() == before
    assert session.calls == 1 + len(bad_calls)


@pytest.mark.parametrize(
    ("finite", "given_", "wanted"),
    [("clip", math.inf, 200.0), ("clip", -3.0, 0.0), ("clip", 3.0, 6.0), ("pass", math.inf, math.inf)],
)
def test_the_policy_for_what_is_not_finite_holds_in_a_call(finite, given_, wanted):
    _, bound = processed(finite=finite)
    x = np.array([[given_, 1.0]], np.float32)
    assert bound.run({"x": x}).outputs["y"][0, 0] == np.float32(wanted)
    assert x[0, 0] == np.float32(given_)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_images_are_turned_whatever_their_channels(channels, dtype):
    image = np.random.default_rng(channels).integers(-99, 99, (2, channels, 5, 7)).astype(dtype)
    spec = TensorSpec(name="image", dtype=dtype, shape=(None, channels, 5, 7), axes="NCHW")
    turned = input_converter(spec, bind("image", "x", (None, 5, 7, channels), dtype=dtype, permutation=(0, 2, 3, 1)))(
        image[:, :, ::-1]
    )
    assert turned.flags.c_contiguous
    assert turned.dtype == dtype
    assert np.array_equal(turned, image[:, :, ::-1].transpose(0, 2, 3, 1))
