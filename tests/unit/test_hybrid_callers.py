"""Many callers of one Hybrid, its callbacks, and its end."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.policy import Policy
from outrider_runtimes.errors import (
    DeadlineExceeded,
    QueueFull,
    RemoteUnavailable,
    RunnerClosed,
)
from support.runners import CLASSES, told, until
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid

POLICY = Policy(GENEROUS_MS, min_margin=0.5)


def test_many_threads_get_each_their_own_answer(edge, cloud):
    hybrid = Hybrid(edge, cloud, POLICY)
    seen: list[str] = []
    hybrid.on_prediction(lambda p: seen.append(p.source))
    rng = np.random.default_rng(7)
    inputs = [rng.normal(0.0, 2.0, (1, CLASSES)).astype(np.float32) for _ in range(400)]

    def ask(x):
        return x, hybrid.infer({"x": x})

    with ThreadPoolExecutor(16) as pool:
        for x, prediction in pool.map(ask, inputs):
            gain = {"edge": 1.0, "cloud": 2.0}[prediction.source]
            np.testing.assert_array_equal(prediction.outputs["logits"], x * np.float32(gain))
    assert Counter(seen) == {"edge": edge.submitted - cloud.submitted, "cloud": cloud.submitted}
    assert 0 < cloud.submitted < 400


def test_under_many_threads_one_probe_goes_out(edge, cloud, clock):
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS, min_margin=0.5, failures_in_a_row=1), clock=clock)
    cloud.error = lambda: RemoteUnavailable("down")
    hybrid.infer({"x": UNSURE})
    assert cloud.submitted == 1
    clock.now_s += 10.0
    cloud.error = None
    cloud.hold()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(hybrid.infer, {"x": UNSURE}) for _ in range(8)]
        until(lambda: cloud.submitted == 2 and sum(future.done() for future in futures) == 7)
        assert cloud.submitted == 2
        cloud.let_go()
        assert Counter(told(f.result()) for f in futures) == {
            ("edge_degraded", "circuit_open"): 7,
            ("cloud", "uncertain"): 1,
        }


def test_stuck_sides_hold_no_thread_of_ours(edge, cloud):
    edge.hold()
    cloud.hold()
    hybrid = Hybrid(edge, cloud, Policy(5.0, min_margin=0.5, reserve_ms=1.0))
    with pytest.raises(DeadlineExceeded):
        hybrid.infer({"x": SURE})  # the first call starts what looks at the board's heat
    before = set(threading.enumerate())
    for _ in range(30):
        with pytest.raises((DeadlineExceeded, QueueFull)):
            hybrid.infer({"x": SURE})
    assert set(threading.enumerate()) <= before


def test_callbacks_come_and_go_and_may_fail(edge, cloud, caplog):
    hybrid = Hybrid(edge, cloud, POLICY)
    first, second = [], []
    off = hybrid.on_prediction(first.append)
    hybrid.on_prediction(lambda _: 1 / 0)
    hybrid.on_prediction(second.append)
    predictions = [hybrid.infer({"x": SURE}), hybrid.infer({"x": SURE})]
    off()
    off()
    predictions.append(hybrid.infer({"x": UNSURE}))
    assert first == predictions[:2]
    assert second == predictions
    assert len([r for r in caplog.records if "callback" in r.message]) == 1


def test_the_same_callback_twice_is_two(edge, cloud):
    hybrid, seen = Hybrid(edge, cloud, POLICY), []
    callback = seen.append
    off = hybrid.on_prediction(callback)
    hybrid.on_prediction(callback)
    off()
    hybrid.infer({"x": SURE})
    assert len(seen) == 1


def test_close_ends_the_hybrid_and_neither_side(edge, cloud):
    with Hybrid(edge, cloud, POLICY) as hybrid:
        assert hybrid.interface is edge.interface
    with pytest.raises(RunnerClosed):
        hybrid.infer({"x": SURE})
    assert told(Hybrid(edge, cloud, POLICY).infer({"x": UNSURE})) == ("cloud", "uncertain")
