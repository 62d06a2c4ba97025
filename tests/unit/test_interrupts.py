"""Exceptions out of signal handlers: one at every point of a call at which Python would let a handler run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.breaker import Breaker
from outrider.hybrid import Hybrid
from outrider.model import Model
from outrider.policy import Policy
from outrider_runtimes.deadline import Deadline
from support.doubling import ONE, Doubler, bound, model_of
from support.interrupts import Interrupt, interrupted
from support.straight import StraightRunner

WAIT_MS = 120_000.0


@pytest.fixture
def model() -> Iterator[Model]:
    with model_of(bound(Doubler())) as model:
        yield model


@pytest.mark.parametrize("deadline_ms", [None, WAIT_MS])
def test_after_a_call_that_was_interrupted_anywhere_the_next_is_answered(
    model: Model, deadline_ms: float | None
) -> None:
    model.infer(ONE, deadline_ms=WAIT_MS)  # starts its thread
    worker = model._worker
    assert worker is not None
    at = 0
    while True:
        at += 1
        whole = not interrupted(lambda: model.infer(ONE, deadline_ms=deadline_ms), at)
        for value in (3.0, 4.0):
            outputs = model.infer(ONE * value, deadline_ms=WAIT_MS).outputs
            assert outputs["y"][0] == 2 * value, f"after an interrupt at point {at}"
        assert worker.depth == 0, f"after an interrupt at point {at}"
        if whole:
            break
    assert at > 10


STILL = {"hot_c": None, "offload_when_throttled": False, "offload_when_low_power": False, "deadline_ms": WAIT_MS}
WAYS = {
    "uncertain": {"min_margin": 1.0},
    "hedge": {"hedge_after_ms": 0.0},
    "audit": {"min_margin": 0.1, "audit_share": 1.0, "audit_allowed": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_probe_that_was_interrupted_anywhere_leaves_the_next_call_free_to_probe(way: str, tmp_path: Path) -> None:
    x, at = np.float32([[9.0, 0.0, 0.0, 0.0]]), 0
    while True:
        at += 1
        edge, cloud, now_s = StraightRunner(), StraightRunner(), [100.0]
        policy = Policy(**STILL, **WAYS[way], failures_in_a_row=1)
        edge.never = way == "hedge"
        with Hybrid(edge, cloud, policy, root=tmp_path, clock=lambda now=now_s: now[0]) as hybrid:
            hybrid._cloud.breaker = Breaker(streak=1, recent=1, opened=1, until_s=50.0)
            whole = not interrupted(lambda: hybrid.infer(x), at)
            probed = hybrid._cloud.breaker.probing
            now_s[0] += 1000.0
            assert not probed and hybrid.infer(x).reason == way, f"after an interrupt at point {at}"
            assert hybrid._audits.idle
        if whole:
            break
    assert at > 50


def test_a_side_that_ends_with_no_exception_of_ours_leaves_the_circuit_as_it_was(tmp_path: Path) -> None:
    edge, cloud = StraightRunner(), StraightRunner()
    cloud.error = Interrupt()  # type: ignore[assignment]
    policy = Policy(**STILL, **WAYS["uncertain"])
    with Hybrid(edge, cloud, policy, root=tmp_path) as hybrid:
        hybrid._cloud.breaker = Breaker(streak=5, recent=31, opened=1, until_s=0.0)
        with pytest.raises(Interrupt):
            hybrid._cloud.ask({"x": np.zeros((1, 4), np.float32)}, Deadline.after_ms(WAIT_MS))
        assert not hybrid._cloud.breaker.probing
