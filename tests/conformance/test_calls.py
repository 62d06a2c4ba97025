"""A session behind its interface, on every engine and every way that a call can take through the conversions."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InferenceError, InputError
from outrider_runtimes.processing import Softmax, around
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from outrider_runtimes.worker import Worker
from support.models import INT8_X, INT8_Y, LINEAR_B, LINEAR_W


@dataclass(frozen=True, kw_only=True)
class Way:
    """A file (one input x, one output y) and what a caller of it passes and gets."""

    kind: str
    x: TensorSpec
    y: TensorSpec
    permutation: tuple[int, ...] = ()
    softmax: bool = False
    rows: int = 1

    def open(self, engine, model_file) -> BoundSession:
        session = engine.prepare(model_file(f"{engine.formats[0]}-{self.kind}"), threads=1)
        interface = Interface(inputs=(self.x,), outputs=(self.y,))
        if self.softmax:
            interface = around(interface, (self.x,), (), (Softmax(tensor="y"),))
        return BoundSession(session, interface, self.binding(session))

    def binding(self, session) -> Binding:
        stated = {"x": INT8_X, "y": INT8_Y} if self.kind == "int8" else {}  # by hand: an ONNX file has no place for it

        def bind(name, tensor):
            scale, zero_point = stated.get(name, (tensor.scale, tensor.zero_point))
            return TensorBinding(
                name=name,
                file_name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                permutation=self.permutation,
                scale=scale,
                zero_point=zero_point,
            )

        return Binding(inputs=(bind("x", session.inputs[0]),), outputs=(bind("y", session.outputs[0]),))

    def draw(self, seed: int) -> np.ndarray:
        shape = [self.rows if size is None else size for size in self.x.shape]
        return np.random.default_rng(seed).uniform(-1, 1, shape).astype(self.x.dtype)


def linear(dtype: str = "float32", **more) -> tuple[TensorSpec, TensorSpec]:
    x = TensorSpec(name="x", dtype=dtype, shape=(None, 4), axes="NC", **more)
    return x, TensorSpec(name="y", dtype=dtype, shape=(None, 3), axes="NC")


def turned(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(3, 1))


X, Y = linear()
X64, Y64 = linear("float64")
WAYS = {
    "plain": Way(kind="linear", x=X, y=Y),
    "several rows": Way(kind="linear", x=X, y=Y, rows=5),
    "a fixed batch": Way(kind="fixed-2", x=X, y=Y, rows=2),
    "over a fixed batch": Way(kind="fixed-2", x=X, y=Y, rows=6),
    "no rows over a fixed batch": Way(kind="fixed-2", x=X, y=Y, rows=0),
    "another dtype": Way(kind="linear", x=X64, y=Y64),
    "another layout": Way(kind="same-float32", x=turned("x"), y=turned("y"), permutation=(1, 0)),
    "no conversion of an echo": Way(
        kind="same-float32",
        x=TensorSpec(name="x", dtype="float32", shape=(1, 3)),
        y=TensorSpec(name="y", dtype="float32", shape=(1, 3)),
    ),
    "postprocessing": Way(kind="linear", x=X, y=Y, softmax=True, rows=2),
    "quantized": Way(kind="int8", x=X, y=Y),
}


@pytest.fixture(params=WAYS)
def way(request) -> Way:
    return WAYS[request.param]


def test_an_answer_is_right_and_is_the_callers_to_keep(engine, model_file, way):
    """The next call's input is written over the first one's, and the first answer is as it was."""
    bound = way.open(engine, model_file)
    x = way.draw(1)
    kept = bound.run({"x": x}).outputs["y"]
    expected = x if way.kind.startswith("same") else (x @ LINEAR_W + LINEAR_B)
    if way.softmax:
        expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(kept, expected, atol=0.3 if way.kind == "int8" else 1e-5)
    assert kept.dtype.name == way.y.dtype
    copy = kept.copy()
    assert not np.shares_memory(kept, x)
    x[...] = way.draw(2)
    again = bound.run({"x": x}).outputs["y"]
    assert not np.shares_memory(kept, again)
    assert kept.tobytes() == copy.tobytes()
    kept += 1  # writable, and nobody else's
    assert bound.run({"x": x}).outputs["y"].tobytes() == again.tobytes()
    bound.close()
    assert kept.tobytes() == (copy + 1).tobytes()


BAD_CALLS = [
    lambda x: {"x": np.full_like(x, np.nan)},
    lambda x: {"x": np.full_like(x, np.inf)},
    lambda x: {"x": x.astype(np.float16)},
    lambda x: {"x": x[..., np.newaxis]},
    lambda x: {"x": np.concatenate([x, x], axis=1)},
    lambda x: {"y": x},
    lambda x: {"x": x, "y": x},
    lambda x: {"x": x.tolist()},
    lambda x: [x],
]


def test_a_call_after_bad_ones_gives_the_same_bits(engine, model_file, way):
    if not way.rows:
        way = WAYS["a fixed batch"]  # an array of no rows has nothing that could be bad
    bound = way.open(engine, model_file)
    x = way.draw(3)
    before = bound.run({"x": x}).outputs["y"].tobytes()
    for bad in BAD_CALLS:
        with pytest.raises(InputError):
            bound.run(bad(x))
        assert bound.run({"x": x}).outputs["y"].tobytes() == before


def test_a_call_after_one_that_the_engine_refused_gives_the_same_bits(engine, model_file):
    bound = WAYS["a fixed batch"].open(engine, model_file)
    x = WAYS["a fixed batch"].draw(4)
    before = bound.run({"x": x}).outputs["y"].tobytes()
    for rows in (1, 3, 5):
        with pytest.raises(InferenceError, match="multiple"):
            bound.run({"x": np.zeros((rows, 4), np.float32)})
    assert bound.run({"x": x}).outputs["y"].tobytes() == before


def test_several_threads_share_one_session(engine, model_file, way):
    """Each has inputs of its own, and every answer is the one that it gets alone."""
    bound = way.open(engine, model_file)
    inputs = [way.draw(seed) for seed in range(4)]
    wanted = [bound.run({"x": x}).outputs["y"].tobytes() for x in inputs]
    wrong = []

    def work(at):
        for _ in range(50):
            if bound.run({"x": inputs[at]}).outputs["y"].tobytes() != wanted[at]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_worker_gives_the_same_answers(engine, model_file, way):
    """Through its queue and its own thread; what it gave is kept while it answers more."""
    bound = way.open(engine, model_file)
    inputs = [way.draw(seed) for seed in range(4)]
    wanted = [bound.run({"x": x}).outputs["y"].tobytes() for x in inputs]
    worker = Worker(bound)
    try:
        futures = [worker.submit({"x": x}, Deadline.after_ms(250_000)) for x in inputs]
        answers = [future.result(250) for future in futures]
    finally:
        worker.close()
    assert [answer.outputs["y"].tobytes() for answer in answers] == wanted
