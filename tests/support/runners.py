"""Runners over numpy and a thread of their own, whose delay and failure a test holds in its hand.

A second implementation of the Runner protocol beside the Worker and the Remote: one real thread a runner, a queue,
real futures. ``hold()`` keeps it from finishing anything until ``let_go()``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

import numpy as np

from outrider.prediction import Prediction
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, QueueFull, RunnerClosed
from outrider_runtimes.runner import Answer, Served, Timing
from outrider_runtimes.tensors import Array, Interface, Tensors, TensorSpec, check_inputs

CLASSES = 4

INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, CLASSES), axes="NC"),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, CLASSES), axes="NC"),),
)
OTHER_INTERFACE = Interface(inputs=INTERFACE.inputs, outputs=INTERFACE.outputs, labels=("a", "b", "c", "d"))

_Item = tuple[Tensors, Deadline, "Future[Answer]"]


class NumpyRunner:
    """``logits = x * gain``, so that a test chooses the margin by what it passes.

    ``error``: a factory; what it makes ends every request until it is None again. ``refusal``: the same, but raised by
    ``submit``. ``expected_ms`` is the estimate, which tests set. ``served``: what it says of its answers.
    """

    def __init__(self, *, gain: float = 1.0, interface: Interface = INTERFACE, queue_size: int = 64) -> None:
        self.interface = interface
        self.gain = np.float32(gain)
        self.error: Callable[[], Exception] | None = None
        self.refusal: Callable[[], Exception] | None = None
        self.expected_ms: float | None = None
        self.served: Served | None = None
        self.submitted = 0
        self.finished = 0
        self.ran_here = 0
        self.during_here: Callable[[], object] = lambda: None
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._items: queue.Queue[_Item | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._work, name="numpy-runner", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """From now on nothing is finished, until ``let_go``."""
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        if self._closed:
            raise RunnerClosed("the numpy runner was closed")
        check_inputs(self.interface, inputs)
        if self.refusal is not None:
            raise self.refusal()
        future: Future[Answer] = Future()
        try:
            self._items.put_nowait((inputs, deadline, future))
        except queue.Full:
            raise QueueFull("the numpy runner's queue is full") from None
        self.submitted += 1
        return future

    def run_here(self, inputs: Tensors, deadline: Deadline) -> Answer | None:
        """Never where ``submit`` would refuse or wait."""
        if self.refusal is not None or self.error is not None or self._closed or not self._open.is_set():
            return None
        check_inputs(self.interface, inputs)
        if deadline.passed:
            raise DeadlineExceeded("expired before it was run")
        self.ran_here += 1
        self.during_here()
        return Answer({"logits": self._scaled(inputs)}, Timing(), self.served)

    def estimate_ms(self) -> float | None:
        return self.expected_ms

    def close(self) -> None:
        self._closed = True
        self._open.set()
        self._items.put(None)
        self._thread.join(timeout=120)

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            inputs, deadline, future = item
            self._open.wait()
            self._finish(inputs, deadline, future)
            self.finished += 1

    def _scaled(self, inputs: Tensors) -> Array:
        with np.errstate(over="ignore"):
            return inputs["x"] * self.gain

    def _finish(self, inputs: Tensors, deadline: Deadline, future: Future[Answer]) -> None:
        begun = time.perf_counter_ns()
        # A caller that went away has cancelled the future; nobody is left to be told.
        with contextlib.suppress(InvalidStateError):
            if self.error is not None:
                future.set_exception(self.error())
            elif deadline.passed:
                future.set_exception(DeadlineExceeded("expired in the queue"))
            else:
                logits = self._scaled(inputs)
                ran_ms = (time.perf_counter_ns() - begun) / 1e6
                timing = Timing(infer=ran_ms, total=ran_ms)
                future.set_result(Answer(outputs={"logits": logits}, timing_ms=timing, served=self.served))


class ConnectingRunner(NumpyRunner):
    """One whose interface has to be asked for first, as a Remote's; ``down`` and ``slow_s`` are the network's mood."""

    def __init__(self, *, down: bool = False, slow: bool = False, interface: Interface = INTERFACE) -> None:
        super().__init__(interface=interface)
        self.interface_digest: str | None = None
        self.connects = 0
        self.down = down
        self.slow = slow
        self._never = threading.Event()

    def connect(self, deadline: Deadline) -> None:
        from outrider_runtimes.errors import RemoteUnavailable

        self.connects += 1
        if self.down:
            raise RemoteUnavailable("connection refused")
        if self.slow:
            self._never.wait(deadline.remaining_s())
            raise DeadlineExceeded("the server says nothing")
        self.interface_digest = self.interface.digest


def told(prediction: Prediction) -> tuple[str, str]:
    """Where an answer came from, and why."""
    return prediction.source, prediction.reason


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Returns when it has come true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.001)
