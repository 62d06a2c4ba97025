"""A session in a child process: what hangs or crashes in it is killed and replaced, and this process lives.

The child is ``python -m outrider_runtimes.isolated SOCKET LIFE``, two inherited descriptors. Over the socket both sides
send messages: two little-endian lengths (uint32, uint64), a JSON header and the bytes of its arrays, one after the
other. The first request names what to load; each later one has the inputs of one call and its number, which the reply
repeats. LIFE is a pipe that nobody writes to: the kernel ends the child when the parent's end of it goes, even while
the child is stuck in an engine.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from outrider_runtimes.deadline import Clock
from outrider_runtimes.engines import FileTensor, Session, engine_named
from outrider_runtimes.environment import child_environment
from outrider_runtimes.errors import InferenceError, ModelLoadError, OutriderError
from outrider_runtimes.tensors import DTYPES, Array

POLL_S = 0.05  # how often a waiting parent asks whether the call is stuck
START_S = 120.0  # to import an engine and load a model; far more than the slowest board takes
MAX_RESTARTS = 5  # within WINDOW_S: a model that crashes at every call must not keep the board busy with starting it
WINDOW_S = 60.0
REAP_S = 1.0  # between the end of a child's socket and its exit code
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 32
_LENGTHS = struct.Struct("<IQ")

Patience = Callable[[], None]  # called while waiting; raises to stop


def _for_ever() -> None:
    """The patience of a child, which has nothing else to do."""


class _Gone(Exception):
    """The other side closed the socket, or broke the protocol."""


class _Stuck(Exception):
    """The caller does not want to wait any longer."""


class IsolatedSession:
    """One loaded model file in a child process; an ``engines.Session``. Not safe from several threads at once.

    Args:
        engine: the engine's name.
        path: the model file.
        threads: how many the engine may use.
        cache: as in ``Engine.prepare``.
        stuck: asked 20 times a second while a call runs; where it says yes the child is killed. Never while a child
            starts.
        clock: seconds, monotonic; for the bound on restarts.

    Raises:
        ModelLoadError: the engine refused the file, or the child died over it.
        OutriderError: what the engine's ``prepare`` raises.
    """

    def __init__(
        self,
        engine: str,
        path: Path,
        *,
        threads: int,
        cache: Path | None = None,
        stuck: Callable[[], bool] = lambda: False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._request = {
            "engine": engine,
            "path": str(path),
            "threads": threads,
            "cache": None if cache is None else str(cache),
        }
        self._name = path.name
        self._stuck = stuck
        self._clock = clock
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._closed = False
        self._interrupted = False
        self._child: _Child | None = _Child(self._request)
        try:
            hello = self._child.hello()
        except (_Gone, _Stuck) as ending:
            raise ModelLoadError(f"{self._name}: the child that loaded it {self._end_child(ending)}") from None
        except BaseException:
            self._end_child()
            raise
        self.inputs = tuple(FileTensor(**_tensor(item)) for item in hello["inputs"])
        self.outputs = tuple(FileTensor(**_tensor(item)) for item in hello["outputs"])
        self.input_names = tuple(tensor.name for tensor in self.inputs)
        self.output_names = tuple(tensor.name for tensor in self.outputs)

    @property
    def pid(self) -> int | None:
        """The child's process id; None where there is none now."""
        child = self._child  # which another thread may end
        return None if child is None else child.pid

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once; see ``engines.Session``.

        An exception from elsewhere in the middle of a call, as a signal's handler raises it, ends the child, whose
        reply nobody takes any more; the next call has a new one.

        Raises:
            InferenceError: the engine failed, the child crashed or was stuck (the next call has a new one), or
                children died too often to start another now.
        """
        if self._closed:
            raise InferenceError("the session was closed")
        child = self._child or self._restarted()
        try:
            child.hello()
            reply = child.ask(inputs, self._patience)
        except _Stuck as ending:
            self._replace(ending)
            raise InferenceError("the call was stuck; its process was killed and replaced") from None
        except _Gone as ending:
            how = self._replace(ending)
            raise InferenceError(f"the process of the model {how}; it was replaced") from None
        except ModelLoadError as error:
            self._end_child()
            raise InferenceError(f"the model could not be loaded again: {error}") from None
        except BaseException as error:
            self._end_child()
            self._interrupted = not isinstance(error, OutriderError)
            raise
        if isinstance(reply, OutriderError):
            raise reply
        return reply

    def close(self) -> None:
        """End the child. A second call does nothing."""
        self._closed = True
        self._end_child()

    def _patience(self) -> None:
        if self._stuck():
            raise _Stuck

    def _replace(self, ending: Exception) -> str:
        """Kill the child and start the next, which loads while the caller deals with the failure."""
        how = self._end_child(ending)
        if may_restart(self._restarts, self._clock()) == 0.0:
            self._restarted()
        return how

    def _restarted(self) -> _Child:
        now_s = self._clock()
        wait_s = 0.0 if self._interrupted else may_restart(self._restarts, now_s)
        if wait_s:
            raise InferenceError(
                f"{MAX_RESTARTS} processes of the model died within {WINDOW_S:g} s; the next starts in {wait_s:.0f} s",
                hint="go back to the last good bundle, or load the model on another engine",
            )
        self._child = _Child(self._request)
        if not self._interrupted:
            self._restarts.append(now_s)
        self._interrupted = False
        return self._child

    def _end_child(self, ending: Exception | None = None) -> str:
        child, self._child = self._child, None
        return "was ended" if child is None else child.end(wait_s=REAP_S if isinstance(ending, _Gone) else 0.0)


def may_restart(restarts: Sequence[float], now_s: float) -> float:
    """How many seconds from now the next child may be started: 0.0 for at once. ``restarts``: when the latest were."""
    recent = [at_s for at_s in restarts if now_s - at_s < WINDOW_S]
    return 0.0 if len(recent) < MAX_RESTARTS else recent[0] + WINDOW_S - now_s


class _Child:
    """One process, from its start to its end."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._socket, theirs = socket.socketpair()
        life, self._life = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "outrider_runtimes.isolated", str(theirs.fileno()), str(life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # engines print there
                cwd="/",
                env=child_environment(sys.path, os.environ),
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            os.close(self._life)
            raise
        finally:
            theirs.close()
            os.close(life)
        self.pid = self._process.pid
        self._hello: Mapping[str, Any] | None = None
        self._number = 0
        self._socket.settimeout(POLL_S)
        self._loads_until_s = time.monotonic() + START_S
        with suppress(_Gone):  # ``hello`` finds out too
            _send(self._socket, request, [])

    def hello(self) -> Mapping[str, Any]:
        """What the child said of the model that it loaded. Raises OutriderError, _Gone, _Stuck."""
        if self._hello is None:
            header, _ = _receive(self._socket, self._starting)
            error = _error_in(header)
            if error is not None:
                raise error
            self._hello = header
        return self._hello

    def ask(self, inputs: Sequence[Array], patience: Patience) -> list[Array] | OutriderError:
        """One call; the error that the child answered with is returned. Raises _Gone, _Stuck.

        Left by any exception, the child is of no more use: its reply is still to come, or a part of it.
        """
        self._number += 1
        _send(self._socket, {"number": self._number, "arrays": _described(inputs)}, inputs, patience)
        header, payload = _receive(self._socket, patience)
        if header.get("number") != self._number:
            raise _Gone
        error = _error_in(header)
        return _arrays(header, payload) if error is None else error

    def end(self, *, wait_s: float = 0.0) -> str:
        """Kill it, if it lives after ``wait_s``, and say how it ended, in words that follow a subject."""
        try:
            self._socket.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
            died_by_itself = self._process.poll() is not None
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            code = self._process.wait()
        finally:
            os.close(self._life)  # which ends it too, where this is interrupted
        if not died_by_itself:
            return "was killed"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _starting(self) -> None:
        if time.monotonic() > self._loads_until_s:
            raise _Stuck


def _described(arrays: Sequence[Array]) -> list[list[Any]]:
    return [[array.dtype.name, list(array.shape)] for array in arrays]


def _arrays(header: Mapping[str, Any], payload: bytearray) -> list[Array]:
    """The arrays of a message, over its own bytes. Raises _Gone where the two do not fit."""
    arrays: list[Array] = []
    at = 0
    for dtype, shape in header["arrays"]:
        if dtype not in DTYPES or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise _Gone
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if at + size_bytes > len(payload):
            raise _Gone
        flat = np.frombuffer(payload, np.uint8, size_bytes, at)
        # Each array its own memory: it is the caller's to keep, and one must not keep all the others alive.
        arrays.append(flat.copy().view(dtype).reshape(shape) if size_bytes else np.zeros(shape, dtype))
        at += size_bytes
    return arrays


def _tensor(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "shape": tuple(item["shape"])}


def _error_in(header: Mapping[str, Any]) -> OutriderError | None:
    if "error" not in header:
        return None
    from outrider_runtimes import errors

    kinds = {kind.__name__: kind for kind in (ModelLoadError, InferenceError, errors.NoEngine)}
    said = header["error"]
    return kinds.get(str(said["type"]), InferenceError)(str(said["message"]), hint=str(said["hint"]))


def _send(
    link: socket.socket, header: Mapping[str, Any], arrays: Sequence[Array], patience: Patience = _for_ever
) -> None:
    """Send one message. Raises _Gone, and what ``patience`` raises."""
    raw = json.dumps(header).encode()
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays if array.size]
    lengths = _LENGTHS.pack(len(raw), sum(len(part) for part in parts))
    for part in (memoryview(lengths + raw), *parts):
        sent = 0
        while sent < len(part):
            try:
                sent += link.send(part[sent:])
            except TimeoutError:
                patience()
            except OSError:
                raise _Gone from None


def _receive(link: socket.socket, patience: Patience = _for_ever) -> tuple[dict[str, Any], bytearray]:
    """Take one message. Raises _Gone, and what ``patience`` raises."""
    header_bytes, payload_bytes = _LENGTHS.unpack(_take(link, _LENGTHS.size, patience))
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise _Gone
    try:
        header = json.loads(_take(link, header_bytes, patience))
    except ValueError:
        raise _Gone from None
    return cast(dict[str, Any], header), _take(link, payload_bytes, patience)


def _take(link: socket.socket, size_bytes: int, patience: Patience) -> bytearray:
    data = bytearray(size_bytes)
    view, at = memoryview(data), 0
    while at < size_bytes:
        try:
            got = link.recv_into(view[at:])
        except TimeoutError:
            patience()
            continue
        except OSError:
            raise _Gone from None
        if not got:
            raise _Gone
        at += got
    return data


def main(argv: Sequence[str]) -> None:
    """The child: load what the first message names, then answer until the socket ends."""
    link = socket.socket(fileno=int(argv[0]))
    _end_with(int(argv[1]))
    with suppress(_Gone):
        request, _ = _receive(link)
        try:
            session = _prepared(request)
        except OutriderError as error:
            _send(link, _failure(error), [])
            return
        sides = {"inputs": session.inputs, "outputs": session.outputs}
        _send(link, {side: [asdict(tensor) for tensor in tensors] for side, tensors in sides.items()}, [])
        while True:
            _answer(link, session)


def _prepared(request: Mapping[str, Any]) -> Session:
    cache = request["cache"]
    return engine_named(request["engine"]).prepare(
        Path(request["path"]), threads=request["threads"], cache=None if cache is None else Path(cache)
    )


def _answer(link: socket.socket, session: Session) -> None:
    header, payload = _receive(link)
    number = {"number": header["number"]}
    try:
        outputs = session.run(_arrays(header, payload))
    except OutriderError as error:
        _send(link, number | _failure(error), [])
    else:
        _send(link, number | {"arrays": _described(outputs)}, outputs)


def _failure(error: OutriderError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error), "hint": error.hint}}


def _end_with(life: int) -> None:
    """Be killed by the kernel when the other end of the pipe ``life`` is closed, which it is when the parent dies."""
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([life], [], [], 0.0)[0]:
        sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
