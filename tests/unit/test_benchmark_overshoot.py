"""The overshoot's promises are kept or missed by the figures, and shown either way; its endpoint does what it says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from benchmarks import overshoot
from benchmarks.faults import FAULTS, GOOD, model_of

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, OutriderError, RemoteRefused, RemoteUnavailable
from outrider_runtimes.remote import Remote
from outrider_runtimes.tensors import Interface, TensorSpec

INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 4), axes="NC"),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 3), axes="NC"),),
)
X = {"x": np.zeros((2, 4), np.float32)}


def found(p99_ms: float) -> dict[str, Any]:
    late = {"p50_ms": 0.2, "p99_ms": p99_ms, "max_ms": 9.0}
    return {"drip": {"Hybrid.infer": late, "Remote": late, "urllib3": late, "threads": 3}}


def result(p99_ms: float, decision_ns: float, *, valid: bool = True) -> dict[str, Any]:
    faults, decisions = found(p99_ms), {"kept": decision_ns, "offloaded": decision_ns / 2}
    return {
        "deadline_ms": 50.0, "calls": 100, "fault_lasts_s": 4.0, "peer": "urllib3 2", "faults": faults,
        "machine": {"p50_ms": 0.1, "p99_ms": 0.4}, "valid": valid, "decision_ns": decisions,
        "promises": overshoot.promises(faults, decisions),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("p99_ms", "decision_ns", "met"),
    [(4.9, 900.0, [True, True]), (5.1, 900.0, [False, True]), (4.9, 1100.0, [True, False])],
)
def test_a_promise_is_kept_or_missed_by_its_figure_and_shown_either_way(p99_ms, decision_ns, met):
    made = result(p99_ms, decision_ns)
    assert [line["met"] for line in made["promises"]] == met
    text = overshoot.section(made)
    assert text.count("- missed: ") == met.count(False)
    assert f"| drip | 0.2 / {p99_ms:.1f} |" in text
    assert "INVALID" not in text
    assert "INVALID" in overshoot.section(result(p99_ms, decision_ns, valid=False))


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    command = [sys.executable, "-m", "benchmarks.faults", "1.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps(INTERFACE.to_dict()) + "\n")
        process.stdin.flush()
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == 0


def asked(url: str, model: str, milliseconds: float) -> Any:
    with Remote(url, model=model) as remote:
        remote.connect(Deadline.after_ms(30_000.0))
        return remote.submit(X, Deadline.after_ms(milliseconds)).result(30.0)


def test_the_endpoint_answers_well_and_misbehaves_as_each_model_is_called(ports):
    url = f"http://127.0.0.1:{ports['port']}"
    np.testing.assert_array_equal(asked(url, GOOD, 30_000.0).outputs["y"], np.zeros((2, 3), np.float32))
    for fault in FAULTS:
        said = {"reset": RemoteUnavailable, "503": RemoteRefused}.get(fault)  # else nothing until the deadline
        with pytest.raises(OutriderError) as caught:
            asked(url, model_of(fault), 60.0 if said is None else 30_000.0)
        assert isinstance(caught.value, said or DeadlineExceeded), fault
        with pytest.raises(OutriderError):  # without a deadline of ours it ends by itself
            asked(url, model_of(fault), 30_000.0)


def test_a_handshake_is_dripped_to_its_end(ports):
    with socket.create_connection(("127.0.0.1", ports["tls_port"])) as connection:
        connection.sendall(b"\x16\x03\x01 as if it were a ClientHello")
        connection.settimeout(30.0)
        said = b""
        while data := connection.recv(4096):
            said += data
        assert said[:1] == b"\x16" and 9 < len(said) < 100
