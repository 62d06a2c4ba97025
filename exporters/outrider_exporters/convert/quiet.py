"""Silence for converters: they print bars, logs and warnings from Python and from C++, and none of it is ours."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import IO, TextIO

_log = logging.getLogger(__name__)
_lock = threading.RLock()
NOISY_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnxruntime", "absl", "jax", "litert_torch", "ai_edge_quantizer")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that runs inside prints. What it would have printed goes to this module's logger at DEBUG.

    The file descriptors 1 and 2 are the process's: while this is entered, other threads print nothing either.
    """
    with _lock, _captured() as captured:
        try:
            with _loggers_muted(), _descriptors_to(captured.fileno()), _streams_muted(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            captured.seek(0)
            text = captured.read().decode(errors="replace").strip()
            if text:
                _log.debug("the converters printed:\n%s", text)


def _captured() -> IO[bytes]:
    """A file in memory: on a full disk LLVM ends the whole process when its notes cannot be written."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("outrider-quiet"), "w+b")
    return tempfile.TemporaryFile()


class _Relay(io.TextIOBase):
    """Drops what is written while it is muted, then passes it on: log handlers made inside may keep it for ever."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.muted = True

    def write(self, text: str) -> int:
        return len(text) if self.muted else self._stream.write(text)

    def flush(self) -> None:
        if not self.muted:
            self._stream.flush()

    def writable(self) -> bool:
        return True


@contextlib.contextmanager
def _streams_muted() -> Iterator[None]:
    relays = (_Relay(sys.stdout), _Relay(sys.stderr))
    with contextlib.redirect_stdout(relays[0]), contextlib.redirect_stderr(relays[1]):
        try:
            yield
        finally:
            for relay in relays:
                relay.muted = False


@contextlib.contextmanager
def _descriptors_to(target: int) -> Iterator[None]:
    _flush()
    saved = []
    for number in (1, 2):
        with contextlib.suppress(OSError):  # a daemon may have closed it
            saved.append((number, os.dup(number)))
    try:
        for number, _ in saved:
            os.dup2(target, number)
        yield
    finally:
        _flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _loggers_muted() -> Iterator[None]:
    """Quieter loggers, and no handler on the root logger that a library put there."""
    root = logging.getLogger()
    handlers, root_level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        root.handlers[:] = handlers
        root.setLevel(root_level)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
