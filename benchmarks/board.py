"""A board under load, in a process of its own on one processor: alone, and with the cloud behind it.

``python -m benchmarks.board BUNDLE STATE URL MODEL SECONDS`` prints one line of JSON. It offers three times the rate at
which the model answers here, once with nothing to do, to see what offering takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

import outrider
from benchmarks.arrivals import arrivals_s, call_openly
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, OutriderError, QueueFull
from outrider_runtimes.tensors import Tensors

TIMES_THE_RATE = 3.0
DEADLINE_S = 0.25
THREADS = 64
QUEUE = 4  # a request that waits for more than these has a better chance in the cloud
MEASURED_CALLS, WARM_UP_CALLS, ROUNDS = 60, 10, 2


def main(bundle: str, state: str, url: str, name: str, seconds: str) -> dict[str, Any]:
    """Measure the rate, then offer more than that, in turns alone and with the cloud."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    policy = outrider.Policy(deadline_ms=DEADLINE_S * 1e3, obey_certified=False)
    with (
        outrider.load(bundle, state=state, threads=1, queue_size=QUEUE) as model,
        outrider.Remote(url, model=name, threads=8) as remote,
        outrider.Hybrid(model, remote, policy) as hybrid,
    ):
        inputs = _inputs(model)
        edge_s = _seconds_a_call(lambda: model.infer(inputs))
        cloud_s = _seconds_a_call(lambda: remote.submit(inputs, Deadline.after_ms(10_000.0)).result())
        sources: Counter[str] = Counter()

        def alone(left_s: float) -> str:
            return _said(model, inputs, left_s, Counter())

        def together(left_s: float) -> str:
            return _said(hybrid, inputs, left_s, sources)

        rng = np.random.default_rng(0)
        due_s = arrivals_s(TIMES_THE_RATE / edge_s, float(seconds), rng)
        idle = call_openly(lambda left_s: "good", due_s, threads=THREADS, deadline_s=DEADLINE_S)
        found: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
        for _ in range(ROUNDS):
            for who, call in (("alone", alone), ("together", together)):
                found[who].append(asdict(call_openly(call, due_s, threads=THREADS, deadline_s=DEADLINE_S)))
    return {
        "edge_per_s": 1.0 / edge_s,
        "cloud_per_s": 1.0 / cloud_s,
        "offered_per_s": TIMES_THE_RATE / edge_s,
        "deadline_ms": DEADLINE_S * 1e3,
        "generator_share": idle.own_share,
        "generator_lag_p99_ms": idle.lag_p99_ms,
        "sources": dict(sources),
        **found,
    }


def _inputs(model: outrider.Model) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {
        spec.name: rng.random([1 if size is None else size for size in spec.shape], np.float32)
        for spec in model.interface.inputs
    }


def _seconds_a_call(call: Any) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    begun_s = time.perf_counter()
    for _ in range(MEASURED_CALLS):
        call()
    return (time.perf_counter() - begun_s) / MEASURED_CALLS


def _said(side: outrider.Model | outrider.Hybrid, inputs: Tensors, left_s: float, sources: Counter[str]) -> str:
    try:
        prediction = side.infer(inputs, deadline_ms=max(1.0, left_s * 1e3))
    except (DeadlineExceeded, QueueFull) as error:
        sources[type(error).__name__] += 1
        return "refused"
    except OutriderError as error:
        sources[type(error).__name__] += 1
        return "failed"
    sources[f"{prediction.source}, {prediction.reason}"] += 1
    return "good"


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
