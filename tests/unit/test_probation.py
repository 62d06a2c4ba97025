"""A fresh bundle's first calls: real bundles that pass their admission and fail afterwards, in real processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.admission import Choice
from outrider.bundle import Trust
from outrider.hybrid import Hybrid
from outrider.installer import TRIAL_CALLS, install
from outrider.model import Model, load
from outrider.policy import Policy
from outrider.probation import JUDGED_AFTER, latency_bound_ms, rows_like_the_install, too_late
from outrider.serving import Change
from outrider.store import Store
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InferenceError, RolledBack
from outrider_runtimes.tensors import Interface, TensorSpec
from support import tinymodels
from support.realbundles import INTERFACE, ONNX, expected, images, make_real_bundle
from support.runners import NumpyRunner

W = tinymodels.weights(2)
X = images(3)
BAD = X + 2.0  # what the moody models do not bear
slow = pytest.mark.slow


def digest_of(state: Path) -> str:
    return record(state)["current"]["digest"]


def record(state: Path) -> dict[str, Any]:
    return json.loads((state / "names/tiny.json").read_text())


def upgraded(folder: Path, new: bytes | None = None, **made: Any) -> tuple[str, str]:
    """Version 1 that is good, and version 2 over it, freshly installed; their digests."""
    good = make_real_bundle(folder / "1.outrider", version=1, seed=1)
    fresh = make_real_bundle(
        folder / "2.outrider", version=2, seed=2, files=None if new is None else {"onnx": new}, **made
    )
    install(folder / "1.outrider", state=folder)
    assert record(folder)["trial"] is None  # there is nothing to go back to
    install(folder / "2.outrider", state=folder)
    assert record(folder)["trial"] == {"left": TRIAL_CALLS, "strikes": 0}
    return good, fresh


def right(model: Model, x: np.ndarray, *, seed: int) -> bool:
    return bool(np.allclose(model.predict(x)["logits"], expected(x, seed), atol=1e-3))


@slow
def test_good_calls_over_several_loads_end_the_trial(tmp_path: Path) -> None:
    _, fresh = upgraded(tmp_path)
    for used in (8, 7):
        with load("tiny", state=tmp_path) as model:
            for _ in range(used):
                assert model.infer(X).bundle == fresh
    assert record(tmp_path)["trial"] == {"left": TRIAL_CALLS - 15, "strikes": 0}
    with load("tiny", state=tmp_path) as model:
        for _ in range(5):
            assert model.infer(X, deadline_ms=60_000.0).bundle == fresh
        assert record(tmp_path)["trial"] is None  # at once, not only when it is closed
        assert right(model, X, seed=2)
        assert model.changes == ()
    assert list((tmp_path / "marks").iterdir()) == []
    with load("tiny", state=tmp_path) as proven:
        assert isinstance(proven._session, BoundSession)  # nothing stands between it and the engine any more


@slow
@pytest.mark.parametrize("deadline_ms", [None, 60_000.0])
@pytest.mark.parametrize(("mood", "says"), [("nan", "NaN"), ("error", "ONNX Runtime failed")])
def test_a_failure_in_a_first_call_is_answered_by_what_was_good_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mood: str, says: str, deadline_ms: float | None
) -> None:
    good, fresh = upgraded(tmp_path, tinymodels.moody_onnx(W, mood, above=1.5))
    told: list[Change] = []
    with load("tiny", state=tmp_path) as model, caplog.at_level(logging.WARNING):
        model.on_change(told.append)
        assert model.infer(X, deadline_ms=deadline_ms).bundle == fresh
        prediction = model.infer(BAD, deadline_ms=deadline_ms)
        assert prediction.bundle == good
        assert np.allclose(prediction.outputs["logits"], expected(BAD, 1), atol=1e-3)
        assert (model.bundle.version, model.bundle.digest, model.variant) == (1, good, ONNX)
        assert right(model, X, seed=1)
        (change,) = model.changes
        assert told == [change]
        assert (change.kind, change.before.bundle, change.after.bundle) == ("rollback", fresh, good)
        assert says in change.reason
    assert "tiny: rolled back to version 1" in caplog.text
    assert digest_of(tmp_path) == good
    assert record(tmp_path)["failed"] == [fresh]
    with load("tiny", state=tmp_path) as model:
        assert right(model, X, seed=1)


@slow
def test_a_path_that_was_rolled_back_is_not_installed_again_by_load_but_by_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, fresh = upgraded(tmp_path, tinymodels.moody_onnx(W, "nan", above=1.5))
    with load(tmp_path / "2.outrider", state=tmp_path) as model:
        assert model.infer(BAD).bundle == good
    with load(tmp_path / "2.outrider", state=tmp_path) as model, caplog.at_level(logging.WARNING):
        assert model.bundle.digest == good
    assert "was rolled back when it was tried" in caplog.text
    install(tmp_path / "2.outrider", state=tmp_path)
    assert digest_of(tmp_path) == fresh
    assert record(tmp_path)["failed"] == []


@slow
@pytest.mark.parametrize("mood", ["nan", "error"])
def test_an_input_that_what_was_good_before_does_not_bear_either_is_no_fault_of_the_new(
    tmp_path: Path, mood: str
) -> None:
    make_real_bundle(
        tmp_path / "0.outrider",
        version=1,
        seed=2,
        files={"onnx": tinymodels.moody_onnx(W, mood, above=1.5)},
    )
    install(tmp_path / "0.outrider", state=tmp_path)
    fresh = make_real_bundle(
        tmp_path / "2.outrider", version=2, seed=2, files={"onnx": tinymodels.moody_onnx(W, mood, above=1.4)}
    )
    install(tmp_path / "2.outrider", state=tmp_path)
    with load("tiny", state=tmp_path) as model:
        if mood == "nan":
            assert np.isnan(model.predict(BAD)["logits"]).all()
        else:
            with pytest.raises(InferenceError):
                model.infer(BAD)
        assert model.infer(X).bundle == fresh
        assert model.changes == ()
    assert record(tmp_path)["trial"] == {"left": TRIAL_CALLS - 1, "strikes": 0}


@slow
def test_calls_far_slower_than_measured_go_back(tmp_path: Path) -> None:
    good, fresh = upgraded(tmp_path)
    path = tmp_path / "names/tiny.json"
    kept = record(tmp_path)
    kept["current"]["choice"]["admissions"][0]["bound_ms"] = 1e-9  # which no machine holds
    path.write_text(json.dumps(kept))
    with load("tiny", state=tmp_path) as model:
        served = [model.infer(X).bundle for _ in range(JUDGED_AFTER + 1)]
        assert served == [fresh] * (JUDGED_AFTER - 1) + [good] * 2
        assert "ms is allowed" in model.changes[0].reason


@slow
def test_golden_inputs_that_fail_in_this_process_go_back_at_load(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "1.outrider", seed=1)
    install(tmp_path / "1.outrider", state=tmp_path)
    fresh = make_real_bundle(tmp_path / "2.outrider", version=2, seed=2, golden_shift=0.5)
    store = Store(tmp_path)
    with store.add(tmp_path / "2.outrider", Trust()) as staged:  # as if it had passed
        store.activate(staged, store.installed("tiny").choice, trial_calls=TRIAL_CALLS)
    with load("tiny", state=tmp_path) as model:
        assert right(model, X, seed=1)
        (change,) = model.changes
        assert (change.kind, change.before.bundle, change.before.variant) == ("rollback", fresh, "")
        assert "golden inputs: output 'logits' differs by" in change.reason


SCRIPT = """
import sys
import numpy as np
import outrider
model = outrider.load("tiny", state=sys.argv[1])
print(model.bundle.version, flush=True)
model.infer(np.ones((1, 1, 8, 8), np.float32) * float(sys.argv[2]))
print("answered", flush=True)
sys.stdin.read()
"""


def device(state: Path, value: float) -> subprocess.Popen[str]:
    """A device's program in the middle of its first call, or past it."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(state), str(value)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_inside(state: Path, process: subprocess.Popen[str]) -> None:
    """Until its mark says that a call of it runs and 0.3 s of CPU were spent since: that is the endless loop."""
    ends_at = time.monotonic() + 60.0
    stat = Path(f"/proc/{process.pid}/stat")
    begun: int | None = None
    while time.monotonic() < ends_at:
        used = int(stat.read_text().rpartition(")")[2].split()[11])
        inside = [mark.read_bytes()[:1] for mark in (state / "marks").iterdir()] == [b"1"]
        begun = (used if begun is None else begun) if inside else None
        if begun is not None and used - begun > 0.3 * os.sysconf("SC_CLK_TCK"):
            return
        time.sleep(0.01)
    raise AssertionError("the process never was in its call")


@slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_two_processes_that_die_inside_a_call_take_the_last_good_back(tmp_path: Path, number: signal.Signals) -> None:
    good, fresh = upgraded(tmp_path, tinymodels.endless_onnx(W, above=1.5))
    for strikes in (0, 1):
        process = device(tmp_path, 2.0)
        assert process.stdout is not None and process.stdout.readline() == "2\n"
        assert record(tmp_path)["trial"]["strikes"] == strikes
        wait_inside(tmp_path, process)
        process.send_signal(number)
        assert process.wait(60) == -number
        process.communicate()
    with load("tiny", state=tmp_path) as model:
        assert right(model, BAD, seed=1)
        (change,) = model.changes
        assert (change.before.bundle, change.after.bundle) == (fresh, good)
        assert change.reason == "2 processes died inside its first calls"
    assert digest_of(tmp_path) == good


@slow
def test_a_process_that_is_killed_between_calls_is_no_strike(tmp_path: Path) -> None:
    _, fresh = upgraded(tmp_path)
    for _ in range(3):
        process = device(tmp_path, 0.5)
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["2\n", "answered\n"]
        process.kill()
        process.communicate()
    with load("tiny", state=tmp_path) as model:
        assert model.bundle.digest == fresh
        assert record(tmp_path)["trial"]["strikes"] == 0


@slow
def test_a_crash_in_a_process_of_its_own_goes_back_in_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider_runtimes.isolated.REAP_S", 60.0)
    good, _ = upgraded(tmp_path, tinymodels.endless_onnx(W, above=1.5))
    with load("tiny", state=tmp_path, isolation="process") as model:
        session = model._session._opened.raw  # type: ignore[union-attr]
        child = session.pid  # type: ignore[attr-defined]
        future = model.submit({"image": BAD}, Deadline.after_ms(None))
        ends_at = time.monotonic() + 60.0
        stat = Path(f"/proc/{child}/stat")
        while int(stat.read_text().rpartition(")")[2].split()[11]) < 0.8 * os.sysconf("SC_CLK_TCK"):
            assert time.monotonic() < ends_at
            time.sleep(0.01)
        os.kill(child, signal.SIGSEGV)
        answer = future.result(60.0)
        assert answer.served is not None and answer.served.bundle == good
        assert np.allclose(answer.outputs["logits"], expected(BAD, 1), atol=1e-3)
        assert "SIGSEGV" in model.changes[0].reason


@slow
def test_another_interface_cannot_answer_so_the_model_says_load_again(tmp_path: Path) -> None:
    other = dataclasses.replace(INTERFACE, labels=tuple("abcdefghij"))
    good, _ = upgraded(tmp_path, tinymodels.moody_onnx(W, "nan", above=1.5), interface=other)
    frames = []
    with load("tiny", state=tmp_path) as model:
        for x in (BAD, X, X, X):
            with pytest.raises(
                RolledBack, match=r"rolled back to version 1, which has another interface: a NaN"
            ) as info:
                model.infer(x)
            assert info.value.hint == "load it again"
            frames.append(len(info.traceback))
        assert len(set(frames[1:])) == 1, "no error holds on to the calls before it"
        assert [change.after.bundle for change in model.changes] == [good]
    with load("tiny", state=tmp_path) as model:
        assert right(model, BAD, seed=1)


@slow
def test_a_hybrid_names_what_answered_after_a_rollback(tmp_path: Path) -> None:
    good, fresh = upgraded(tmp_path, tinymodels.moody_onnx(W, "nan", above=1.5))
    with load("tiny", state=tmp_path) as model:
        hybrid = Hybrid(model, NumpyRunner(interface=model.interface), Policy(deadline_ms=60_000.0))
        assert [hybrid.infer({"image": x}).bundle for x in (X, BAD, X)] == [fresh, good, good]
        hybrid.close()


@slow
def test_several_threads_share_one_rollback(tmp_path: Path) -> None:
    good, _ = upgraded(tmp_path, tinymodels.moody_onnx(W, "nan", above=1.5))
    answers: list[str] = []
    with load("tiny", state=tmp_path) as model:
        threads = [
            threading.Thread(target=lambda: answers.extend(model.infer(BAD).bundle for _ in range(5))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert len(model.changes) == 1
    assert answers == [good] * 20


def test_the_bound_is_the_given_one_or_far_from_what_was_measured() -> None:
    choice = Choice(variant="v", engine="e", threads=1, p50_ms=20.0)
    assert latency_bound_ms(choice, None) == 205.0
    assert latency_bound_ms(choice, 30.0) == 30.0


@given(st.lists(st.floats(0.1, 100.0), max_size=40), st.floats(0.1, 100.0))
def test_late_is_judged_by_the_median_of_enough_calls(taken_ms: list[float], bound_ms: float) -> None:
    late = too_late(taken_ms, bound_ms)
    above = sum(each > bound_ms for each in taken_ms)
    if late:
        assert len(taken_ms) >= JUDGED_AFTER and above * 2 >= len(taken_ms)
    elif len(taken_ms) >= JUDGED_AFTER:
        assert above * 2 <= len(taken_ms)


def test_only_calls_of_the_installs_shape_are_timed() -> None:
    image = TensorSpec(name="image", dtype="float32", shape=(None, 2), axes="NC")
    sequence = TensorSpec(name="sequence", dtype="float32", shape=(None, None), axes="NT")
    fixed = TensorSpec(name="fixed", dtype="float32", shape=(2,), axes="C")
    out = (TensorSpec(name="y", dtype="float32", shape=(2,), axes="C"),)
    x, y = np.zeros((5, 2), np.float32), np.zeros(2, np.float32)
    assert rows_like_the_install(Interface(inputs=(image, fixed), outputs=out), [x, y]) == 5
    assert rows_like_the_install(Interface(inputs=(fixed,), outputs=out), [y]) == 1
    assert rows_like_the_install(Interface(inputs=(image,), outputs=out), [x[:0]]) == 1
    assert rows_like_the_install(Interface(inputs=(sequence,), outputs=out), [x]) is None
