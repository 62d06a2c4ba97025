"""Runners without a thread: what is submitted has ended, or never ends. Nothing in a test with them is a race."""

from __future__ import annotations

from concurrent.futures import Future

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import Interface, Tensors
from support.runners import INTERFACE

STATE = ("h", "h_next")


class StraightRunner:
    """``logits = x``, and ``h_next = h + x`` where its interface has that state. ``saw``: copies of what it was given.

    ``error`` ends every request until it is None again; ``never``: no request ends.
    """

    def __init__(self, interface: Interface = INTERFACE) -> None:
        self.interface = interface
        self.error: Exception | None = None
        self.never = False
        self.expected_ms: float | None = None
        self.cloud_only = False
        self.saw: list[dict[str, object]] = []
        self.futures: list[Future[Answer]] = []

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        self.saw.append({name: array.copy() for name, array in inputs.items()})
        future: Future[Answer] = Future()
        self.futures.append(future)
        if self.error is not None:
            future.set_exception(self.error)
        elif not self.never:
            outputs = {"logits": inputs["x"].copy()}
            if STATE[0] in inputs:
                outputs[STATE[1]] = inputs[STATE[0]] + inputs["x"]
            future.set_result(Answer(outputs=outputs, timing_ms=Timing()))
        return future

    def estimate_ms(self) -> float | None:
        return self.expected_ms

    def close(self) -> None:
        pass
