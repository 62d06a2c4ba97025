"""Sessions that double x into y, some of which stop where a test tells them to; and what stands on them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from outrider.model import BundleInfo, Model
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import FileTensor
from outrider_runtimes.errors import InferenceError
from outrider_runtimes.tensors import Array, Binding, Interface, TensorBinding, TensorSpec

ONE = np.ones(1, np.float32)
WAIT_S = 120.0


class Doubler:
    """An engine's session from x: float32 [N] to y: float32 [N]."""

    inputs: tuple[FileTensor, ...] = (FileTensor(name="x", dtype="float32", shape=(None,)),)
    outputs: tuple[FileTensor, ...] = (FileTensor(name="y", dtype="float32", shape=(None,)),)
    input_names: tuple[str, ...] = ("x",)
    output_names: tuple[str, ...] = ("y",)

    def run(self, inputs: Any) -> list[Array]:
        return [inputs[0] * 2]

    def close(self) -> None:
        pass


class Gate(Doubler):
    """One that waits for ``go`` while ``stuck``, and fails what it held when it was closed meanwhile."""

    def __init__(self) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        self.stuck = False
        self.closed = False

    def run(self, inputs: Any) -> list[Array]:
        self.entered.set()
        if self.stuck:
            self.go.wait(WAIT_S)
        if self.closed:
            raise InferenceError("the session was closed")
        return super().run(inputs)

    def close(self) -> None:
        self.closed = True


class GatedSession(Doubler):
    """One whose calls are let through one by one: while ``holding``, a call says that it has begun, and waits.

    ``seen``: the first element of each input that was run. ``during``: called inside each call. A negative number is
    an engine's error.
    """

    def __init__(self) -> None:
        self.holding, self.begun, self.let = False, threading.Semaphore(0), threading.Semaphore(0)
        self.seen: list[float] = []
        self.closed = threading.Event()
        self.during: Any = lambda: None

    def run(self, inputs: Any) -> list[Array]:
        if self.holding:
            self.begun.release()
            assert self.let.acquire(timeout=WAIT_S)
        self.during()
        self.seen.append(float(inputs[0][0]))
        if inputs[0][0] < 0:
            raise InferenceError("a negative number")
        return super().run(inputs)

    def close(self) -> None:
        self.closed.set()


def bound(session: Doubler, inputs: str = "x") -> BoundSession:
    """A session behind an interface that spells each tensor as its file does; ``inputs``: a letter each."""
    specs = {name: TensorSpec(name=name, dtype="float32", shape=(None,), axes="N") for name in f"{inputs}y"}
    bind = {name: TensorBinding(name=name, file_name=name, dtype="float32", shape=(None,)) for name in specs}
    interface = Interface(inputs=tuple(specs[name] for name in inputs), outputs=(specs["y"],))
    return BoundSession(session, interface, Binding(inputs=tuple(bind[n] for n in inputs), outputs=(bind["y"],)))


def model_of(session: BoundSession, **options: Any) -> Model:
    """A Model over a session, of no bundle and no store."""
    info = BundleInfo(name="doubler", version=1, digest="0" * 64, verified=False)
    return Model(session, bundle=info, variant="v", engine="none", threads=1, **options)


def x(value: float) -> dict[str, Array]:
    """The inputs of one call on one number."""
    return {"x": np.array([value], np.float32)}


def result(future: Any) -> float:
    """The number that a call on one number gave."""
    return float(future.result(WAIT_S).outputs["y"][0])
