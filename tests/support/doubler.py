"""An edge for ``support.servers``: a Worker over numpy that doubles its input, and can get stuck as an engine does."""

from __future__ import annotations

import threading

import numpy as np

from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs
from support.servers import INTERFACE


class Doubler:
    """What a Worker runs. ``stick()``: from now on calls do not come back, until ``let_go()``.

    ``held``: whether one is in such a call.
    """

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()
        self.held = False

    @property
    def interface(self) -> Interface:
        return INTERFACE

    def stick(self) -> None:
        self._free.clear()

    def let_go(self) -> None:
        self._free.set()

    def check(self, inputs: Tensors) -> list[Array]:
        check_inputs(INTERFACE, inputs)
        return [inputs["x"]]

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        self.held = not self._free.is_set()
        self._free.wait()
        return Answer(outputs={"y": arrays[0] * np.float32(2)}, timing_ms=Timing(infer=0.001, total=0.001))

    def close(self) -> None:
        self._free.set()
