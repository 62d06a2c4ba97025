"""The processor time that 20 calls a second cost with a 2-thread ONNX model, beside ONNX Runtime as it comes.

The promise: at most 0.1 of it over a minute. Between two calls ONNX Runtime's own threads spin, Outrider's sleep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import outrider
from benchmarks.children import run_program
from benchmarks.handmade import dense, write_handmade
from benchmarks.measure import say
from benchmarks.stats import ratio

CALLS_A_SECOND, THREADS = 20, 2
SEGMENT_S, SEGMENTS = 10.0, 6  # of each, in turn: a minute in all
ALLOWED_RATIO = 0.1
FIRST_CALLS = 200
NETWORK = dense("idle", 640, 3)

# Both: load, then answer at the given rate for the given time; the processor time of that, of all threads, in seconds.
LOOP = """
import json, resource, sys, time
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
def measure(call, rate, seconds):
    call()
    taken, begun, spent = [], time.monotonic(), used()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        entered = time.perf_counter()
        call()
        taken.append(time.perf_counter() - entered)
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    print(json.dumps({"cpu_s": used() - spent, "p50_ms": sorted(taken)[len(taken) // 2] * 1e3}), flush=True)
import numpy as np
width, rate, seconds, threads = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
x = np.ones((1, width), np.float32)
"""
OURS = """
import outrider
model = outrider.load(sys.argv[5], variant="onnx-float32", threads=threads, state=sys.argv[6])
measure(lambda: model.infer({"x": x}), rate, seconds)
"""
RAW = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(sys.argv[5], options)
measure(lambda: session.run(None, {"x": x}), rate, seconds)
"""


def run(folder: Path) -> dict[str, Any]:
    """Measure, two minutes. Returns what is stored as ``results/idle.json``."""
    bundle = write_handmade(NETWORK, folder, formats=["onnx"])
    state = folder / "state"
    outrider.install(bundle, state=state)
    with outrider.load(NETWORK.name, threads=THREADS, state=state) as model:
        for _ in range(FIRST_CALLS):
            model.infer(NETWORK.input())
    common = (str(NETWORK.width), str(CALLS_A_SECOND), str(SEGMENT_S), str(THREADS))
    programs = {
        "raw": (LOOP + RAW, *common, str(bundle.with_suffix(".onnx"))),
        "outrider": (LOOP + OURS, *common, NETWORK.name, str(state)),
    }
    said: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for number in range(SEGMENTS):
        say(f"idle: {number + 1} of {SEGMENTS}")
        for name in list(programs)[:: 1 if number % 2 else -1]:
            said[name].append(run_program(*programs[name]).said)
    used = {name: np.array([[each["cpu_s"]] for each in parts]) for name, parts in said.items()}
    found = ratio(used["outrider"], used["raw"], np.random.default_rng(0))
    return {
        "calls_a_second": CALLS_A_SECOND,
        "threads": THREADS,
        "seconds": SEGMENT_S * SEGMENTS,
        "cores_busy": {name: float(values.sum() / (SEGMENT_S * SEGMENTS)) for name, values in used.items()},
        "p50_ms": {name: float(np.median([each["p50_ms"] for each in parts])) for name, parts in said.items()},
        "ratio": vars(found),
        "allowed_ratio": ALLOWED_RATIO,
        "kept": found.value <= ALLOWED_RATIO,
    }
