"""Answers as JSON lines, in a file of bounded size or on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Final

import numpy as np

from outrider.agent.config import OutputConfig
from outrider.agent.logs import say
from outrider.prediction import Prediction
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tensors import Array, Interface

SUMMARY_VALUES: Final = 64


class AnswerWriter:
    """Writes one line an answer. That a line cannot be written is logged, and no reason to stop answering.

    Attributes:
        lost: lines that could not be written.
    """

    def __init__(self, config: OutputConfig, *, wall: Callable[[], float] = time.time) -> None:
        """Open the file. Raises ConfigError."""
        self.lost = 0
        self._config = config
        self._wall = wall
        self._owned = config.file != "-"
        try:
            self._file = self._open() if self._owned else sys.stdout
        except OSError as error:
            raise ConfigError(
                f"output.file {config.file} cannot be written: {error.strerror}", hint="check the folder and its rights"
            ) from None

    def write(self, name: str, prediction: Prediction, interface: Interface) -> None:
        """One answer; ``name``: of the frame."""
        line = {
            "at_s": round(self._wall(), 3),
            "name": name,
            "source": prediction.source,
            "reason": prediction.reason,
            "variant": prediction.variant,
            "total_ms": round(prediction.timing_ms.total, 3),
            **shown_outputs(prediction, interface, self._config.values),
        }
        try:
            if self._owned and self._file.closed:  # it could not be opened anew when it was full
                self._file = self._open()
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            if self._owned and self._file.tell() >= self._config.max_bytes:
                self._turn()
        except (OSError, ValueError) as error:  # ValueError: a standard output that was closed
            self.lost += 1
            if self.lost & (self.lost - 1) == 0:
                say("answer_lost", level=logging.WARNING, lost=self.lost, error=str(error))

    def close(self) -> None:
        """Close the file."""
        if self._owned:
            self._file.close()

    def _open(self) -> IO[str]:
        descriptor = os.open(self._config.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def _turn(self) -> None:
        self._file.close()
        os.replace(self._config.file, f"{self._config.file}.1")  # noqa: PTH105 - a path as text from here to there
        self._file = self._open()


def shown_outputs(prediction: Prediction, interface: Interface, values: str) -> dict[str, Any]:
    """What a line says of the outputs: numbers (null where they are not finite), and labels where there are some."""
    shown: dict[str, Any] = {}
    if values != "none":
        shown["outputs"] = {
            name: plain(array) if values == "all" or array.size <= SUMMARY_VALUES else _size(array)
            for name, array in prediction.outputs.items()
        }
    for array in prediction.outputs.values():
        if interface.labels and array.ndim == 2 and array.shape[1] == len(interface.labels) and array.size:
            shown["labels"] = [interface.labels[best] for best in array.argmax(axis=1)]
            break
    return shown


def plain(array: Array) -> Any:
    """Nested lists, with None for what is not finite: JSON has no NaN."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        objects = array.astype(object)
        objects[~np.isfinite(array)] = None
        return objects.tolist()
    return array.tolist()


def _size(array: Array) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape)}
