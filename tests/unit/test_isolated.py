"""A session in a child process: real children that really hang, crash and are killed."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes import isolated
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import DeadlineExceeded, InferenceError, ModelLoadError, NoEngine
from outrider_runtimes.isolated import MAX_RESTARTS, WINDOW_S, IsolatedSession, may_restart
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from outrider_runtimes.worker import Worker
from support import models, tinymodels
from support.runners import until

pytestmark = pytest.mark.slow

W = tinymodels.weights()
X = tinymodels.images(3) * 0.5
HANGS = np.ones_like(X)
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def slow_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the kernel takes to end a killed child, how it ended is told."""
    monkeypatch.setattr(isolated, "REAP_S", 60.0)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tinymodels.endless_onnx(W, above=0.9))
    return path


@pytest.fixture
def session(onnx: Path) -> Iterator[IsolatedSession]:
    session = IsolatedSession("onnxruntime", onnx, threads=1)
    yield session
    session.close()


def alive(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pid: int | None) -> None:
    ends_at = time.monotonic() + WAIT_S
    while alive(pid):
        assert time.monotonic() < ends_at, f"process {pid} still lives"
        time.sleep(0.01)


def ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait_busy(pid: int) -> None:
    """Until the child has burnt 0.3 s of CPU beyond its start: it is in the engine then."""
    begun, ends_at = ticks(pid), time.monotonic() + WAIT_S
    while ticks(pid) - begun < 0.3 * os.sysconf("SC_CLK_TCK"):
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def in_process(path: Path, engine: str = "onnxruntime") -> list[np.ndarray]:
    return list(engine_named(engine).prepare(path, threads=1).run([X]))


def test_the_answers_are_the_same_bits(session: IsolatedSession, onnx: Path) -> None:
    (there,) = session.run([X])
    (here,) = in_process(onnx)
    assert there.dtype == here.dtype and there.tobytes() == here.tobytes()
    assert session.input_names == ("x",) and session.output_names == ("y",)
    assert session.inputs == engine_named("onnxruntime").prepare(onnx, threads=1).inputs
    there[:] = 0.0  # the caller's to keep, and to change
    assert session.run([X])[0].tobytes() == here.tobytes()


def test_tflite_gives_the_same_bits_in_a_child(tmp_path: Path) -> None:
    path = tmp_path / "tiny.tflite"
    path.write_bytes(tinymodels.classifier_tflite(W))
    x = np.ascontiguousarray(X[:1].transpose(0, 2, 3, 1))
    session = IsolatedSession("litert", path, threads=1)
    assert session.run([x])[0].tobytes() == engine_named("litert").prepare(path, threads=1).run([x])[0].tobytes()
    assert session.inputs == engine_named("litert").prepare(path, threads=1).inputs
    session.close()


def test_every_kind_of_tensor_and_empty_ones_pass(tmp_path: Path) -> None:
    from onnx import helper

    dtypes = ("bool", "float16", "int64", "float64", "uint8")
    nodes = [helper.make_node("Identity", [f"x{dtype}"], [f"y{dtype}"]) for dtype in dtypes]
    sides = [[(f"{end}{dtype}", dtype, ["N", 3]) for dtype in dtypes] for end in "xy"]
    session = IsolatedSession("onnxruntime", models.write_onnx(tmp_path / "m.onnx", nodes, *sides), threads=1)
    for rows in (2, 0, 50_000):
        x = [(np.arange(rows * 3).reshape(rows, 3) % 7).astype(dtype) for dtype in dtypes]
        for sent, got in zip(x, session.run(x), strict=True):
            assert (got.dtype, got.shape, got.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())
    session.close()


def test_several_outputs_do_not_keep_each_other_alive(tmp_path: Path) -> None:
    session = IsolatedSession("onnxruntime", models.onnx_several(tmp_path / "m.onnx"), threads=1)
    a, i = np.float32([[1, 2]]), np.array([5], np.int64)
    total, difference, echo = session.run([a, a, i])
    assert (total.tolist(), difference.tolist(), echo.tolist()) == ([[2, 4]], [[0, 0]], [5])
    assert total.base is None or total.base.nbytes == total.nbytes
    session.close()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGILL, signal.SIGABRT])
def test_a_child_that_died_between_calls_is_named_and_the_next_call_is_answered(
    session: IsolatedSession, onnx: Path, number: signal.Signals
) -> None:
    first = session.pid
    assert first is not None
    os.kill(first, number)
    wait_gone(first)
    with pytest.raises(InferenceError, match=f"was killed by {number.name}; it was replaced"):
        session.run([X])
    assert session.run([X])[0].tobytes() == in_process(onnx)[0].tobytes()
    assert session.pid != first


def test_a_crash_in_the_middle_of_a_call(session: IsolatedSession) -> None:
    first = session.pid
    assert first is not None
    striker = threading.Thread(target=lambda: (wait_busy(first), os.kill(first, signal.SIGSEGV)))
    striker.start()
    with pytest.raises(InferenceError, match="SIGSEGV"):
        session.run([HANGS])
    striker.join()
    assert session.run([X])[0].shape == (3, 10)


def test_after_an_interrupted_call_no_answer_is_that_of_the_call_before_and_no_crash_is_counted(
    session: IsolatedSession,
) -> None:
    xs = [tinymodels.images(1, seed=seed) * 0.5 for seed in range(3)]
    expected = [session.run([x])[0].tobytes() for x in xs]
    session._stuck = interrupt  # as a signal's handler raises, while the call waits
    for _ in range(MAX_RESTARTS + 1):
        child = session.pid
        assert child is not None
        os.kill(child, signal.SIGSTOP)  # its reply comes later, or would
        with pytest.raises(KeyboardInterrupt):
            session.run([xs[0]])
        wait_gone(child)
        session._stuck = lambda: False
        assert [session.run([x])[0].tobytes() for x in xs] == expected
        session._stuck = interrupt


def interrupt() -> bool:
    raise KeyboardInterrupt


def test_an_interrupt_while_the_next_child_starts_is_no_crash_either(
    session: IsolatedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.run([X])[0].tobytes()
    for _ in range(2 * MAX_RESTARTS):
        with monkeypatch.context() as patched:
            patched.setattr(isolated._Child, "hello", lambda _: interrupt())
            with pytest.raises(KeyboardInterrupt):
                session.run([X])
        assert session.pid is None
    assert session.run([X])[0].tobytes() == expected


def test_the_reply_to_another_request_is_never_taken(session: IsolatedSession) -> None:
    expected = session.run([X])[0].tobytes()
    child = session._child
    assert child is not None
    isolated._send(child._socket, {"number": 7, "arrays": isolated._described([X[:1]])}, [X[:1]])
    with pytest.raises(InferenceError, match="it was replaced"):
        session.run([X])
    assert session.run([X])[0].tobytes() == expected


def test_an_engines_error_is_the_same_and_the_child_lives(session: IsolatedSession) -> None:
    first = session.pid
    with pytest.raises(InferenceError, match="ONNX Runtime failed"):
        session.run([np.zeros((1, 1, 3, 3), np.float32)])
    assert session.run([X])[0].shape == (3, 10)
    assert session.pid == first


def worker_of(session: IsolatedSession) -> Worker:
    """Over the session, which is told when its call is stuck."""
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 1, 8, 8), axes="NCHW")
    logits = TensorSpec(name="y", dtype="float32", shape=(None, 10), axes="NC")
    binding = Binding(
        inputs=(TensorBinding(name="x", file_name="x", dtype="float32", shape=(None, 1, 8, 8)),),
        outputs=(TensorBinding(name="y", file_name="y", dtype="float32", shape=(None, 10)),),
    )
    return Worker(BoundSession(session, Interface(inputs=(spec,), outputs=(logits,)), binding))


@pytest.mark.parametrize("frozen", [False, True], ids=["endless loop", "stopped"])
def test_a_stuck_call_is_killed_and_the_next_is_answered(onnx: Path, frozen: bool) -> None:
    session = IsolatedSession("onnxruntime", onnx, threads=1, stuck=lambda: worker.sick)
    worker = worker_of(session)
    expected = worker.submit({"x": X}, Deadline.after_ms(None)).result(WAIT_S).outputs["y"]
    first = session.pid
    assert first is not None
    if frozen:
        os.kill(first, signal.SIGSTOP)
    now_s = [0.0]
    stuck = worker.submit({"x": HANGS}, Deadline(1.0, clock=lambda: now_s[0]))
    until(lambda: session._child is not None and session._child._number == 2)  # it is in its call
    now_s[0] = 2.0
    with pytest.raises(InferenceError, match="was stuck; its process was killed"):
        stuck.result(WAIT_S)
    wait_gone(first)
    answer = worker.submit({"x": X}, Deadline.after_ms(None)).result(WAIT_S)
    assert answer.outputs["y"].tobytes() == expected.tobytes()
    assert not worker.sick
    worker.close()
    assert session.pid is None


def test_close_ends_a_stuck_child_whose_call_has_no_deadline(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outrider_runtimes import worker as worker_module

    monkeypatch.setattr(worker_module, "CLOSE_TIMEOUT_S", 0.05)
    session = IsolatedSession("onnxruntime", onnx, threads=1, stuck=lambda: worker.sick)
    worker = worker_of(session)
    child = session.pid
    assert child is not None
    stuck = worker.submit({"x": HANGS}, Deadline.after_ms(None))
    wait_busy(child)
    worker.close()
    with pytest.raises((InferenceError, DeadlineExceeded)):
        stuck.result(WAIT_S)
    wait_gone(child)


def test_children_that_die_again_and_again_are_not_started_for_ever(onnx: Path) -> None:
    now_s = [0.0]
    session = IsolatedSession("onnxruntime", onnx, threads=1, clock=lambda: now_s[0])
    for _ in range(MAX_RESTARTS + 1):
        assert session.pid is not None
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(InferenceError, match="SIGKILL"):
            session.run([X])
        now_s[0] += 1.0
    assert session.pid is None
    with pytest.raises(InferenceError, match=f"{MAX_RESTARTS} processes of the model died within 60 s") as info:
        session.run([X])
    assert "last good" in info.value.hint
    now_s[0] = WINDOW_S
    assert session.run([X])[0].shape == (3, 10)
    session.close()


def seconds(most: int) -> st.SearchStrategy[float]:
    """Such as add up without rounding."""
    return st.integers(0, most * 1024).map(lambda n: n / 1024)


@given(st.lists(seconds(200), max_size=MAX_RESTARTS).map(sorted), seconds(100))
def test_no_window_ever_has_more_restarts_than_allowed(restarts: list[float], later_s: float) -> None:
    now_s = (restarts[-1] if restarts else 0.0) + later_s
    wait_s = may_restart(restarts, now_s)
    inside = [at for at in restarts if now_s - at < WINDOW_S]
    assert (wait_s == 0.0) == (len(inside) < MAX_RESTARTS)
    assert 0.0 <= wait_s <= WINDOW_S
    if wait_s:
        assert may_restart(restarts, now_s + wait_s + 1e-6) == 0.0


def test_what_cannot_be_loaded_is_the_engines_error(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(ModelLoadError, match=r"garbage\.onnx"):
        IsolatedSession("onnxruntime", tmp_path / "garbage.onnx", threads=1)
    with pytest.raises(NoEngine, match="there is no engine 'none'"):
        IsolatedSession("none", tmp_path / "garbage.onnx", threads=1)


def test_a_child_that_dies_over_the_file_is_a_load_error(
    tmp_path: Path, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = tmp_path / "deadly" / "onnxruntime"
    deadly.mkdir(parents=True)
    (deadly / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(str(deadly.parent))
    with pytest.raises(ModelLoadError, match="the child that loaded it was killed by SIGSEGV"):
        IsolatedSession("onnxruntime", onnx, threads=1)


def test_a_closed_session_says_so_and_has_no_child(session: IsolatedSession) -> None:
    child = session.pid
    session.close()
    session.close()
    wait_gone(child)
    with pytest.raises(InferenceError, match="closed"):
        session.run([X])


PARENT = """
import sys
from pathlib import Path
import numpy as np
from outrider_runtimes.isolated import IsolatedSession
session = IsolatedSession("onnxruntime", Path(sys.argv[1]), threads=1)
print(session.pid, flush=True)
session.run([np.ones((3, 1, 8, 8), np.float32)])
"""


def test_a_child_that_is_stuck_does_not_outlive_a_parent_that_is_killed(onnx: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(onnx)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_busy(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_gone(child)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (struct.pack("<IQ", 2**31, 0), "a header of 2 GiB"),
        (struct.pack("<IQ", 2, 2**40) + b"{}", "a payload of 1 TiB"),
        (struct.pack("<IQ", 3, 0) + b"{{{", "not JSON"),
        (b"\1\2", "cut short"),
    ],
)
def test_a_child_that_breaks_the_protocol_is_gone(message: bytes, says: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(message)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(isolated._Gone):
            isolated._receive(ours)


@pytest.mark.parametrize(
    "described", [["float32", [3]], ["object", [1]], ["float32", [-1]], ["float32", ["1"]], ["float32", [2**40]]]
)
def test_arrays_that_do_not_fit_their_bytes_are_refused(described: list[object]) -> None:
    with pytest.raises(isolated._Gone):
        isolated._arrays({"arrays": [described]}, bytearray(8))
