"""What a loaded model costs beside its calls: threads, processor time, memory; as the kernel counts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.known_gaps import KEEPS_MEMORY, gap_of
from support import models, tflitefiles, tinymodels
from support.realbundles import make_real_bundle

pytestmark = pytest.mark.slow

PRELUDE = """
import gc, json, os, sys, time
from pathlib import Path
import numpy as np
from outrider_runtimes.engines import engine_named
path = Path(sys.argv[1])
x = np.zeros((256, 256), np.float32)

def threads():
    return len(os.listdir("/proc/self/task"))

def resident_mib():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def raw(**options):
    import onnxruntime
    told = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(told, name, value)
    session = onnxruntime.InferenceSession(str(path), told, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})

def ours(engine="onnxruntime", threads=1):
    session = engine_named(engine).prepare(path, threads=threads)
    return lambda x: session.run([x])
"""


def measured(script: str, path: Path, *, cpus: set[int] | None = None) -> dict[str, Any]:
    """The JSON object that a script prints, in a process bound to ``cpus``."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(path)],
        capture_output=True,
        text=True,
        timeout=280,
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products with a 256 x 256 matrix: enough work that an engine divides it. N is free."""
    from onnx import helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    sides = [("x", "float32", ["N", 256])], [("y", "float32", ["N", 256])]
    return models.write_onnx(tmp_path_factory.mktemp("wide") / "m.onnx", nodes, *sides, [weights])


# Few rows: what the calls themselves take is next to nothing on a slow machine too.
SPIN = """
x = x[:16]
def used_s(call):
    for _ in range(5):
        call(x)
    begun = time.process_time()
    for _ in range(15):
        call(x)
        time.sleep(0.03)
    return time.process_time() - begun

call = ours(threads=2)
called = used_s(call)
begun = time.process_time()
time.sleep(0.3)
idle = time.process_time() - begun
print(json.dumps({"ours": called, "idle": idle, "default": used_s(raw(intra_op_num_threads=2))}))
"""


def test_between_calls_a_model_uses_no_processor_time(wide: Path) -> None:
    used = measured(SPIN, wide)
    assert used["idle"] < 0.03
    assert used["ours"] < used["default"] / 3  # the default spins between calls: the test sees it


ARENA = """
call = {"ours": lambda: ours(), "default": lambda: raw(intra_op_num_threads=1)}
grown = {}
for name, make in call.items():
    run = make()
    run(x)
    before = resident_mib()
    for rows in (1, 80_000, 5, 40_000, 7):
        run(np.zeros((rows, 256), np.float32))
    grown[name] = resident_mib() - before
print(json.dumps(grown))
"""


def test_memory_does_not_grow_with_the_largest_shape_seen(wide: Path) -> None:
    grown = measured(ARENA, wide)
    assert grown["ours"] < 20
    assert grown["default"] > 60  # the arena keeps it: the test sees it


VARYING = """
import random
largest = 1_000_000
run, rng = ours("litert"), random.Random(0)
call = lambda rows: run(np.zeros((rows, 4), np.float32))
call(1)
before, kept = resident_mib(), []
for _ in range(4):
    for rows in (largest, *rng.choices([1, 5, 70_000, 500_000, largest], k=14)):
        call(rows)
    call(1)
    kept.append(resident_mib() - before)
print(json.dumps({"kept": kept, "tensors": largest * 7 * 4 / 2**20}))
"""


def test_litert_keeps_the_memory_of_its_largest_calls_and_no_more_with_every_call(tmp_path: Path) -> None:
    seen = measured(VARYING, tflitefiles.tflite_linear(tmp_path / "m.tflite"))
    first, *later = seen["kept"]
    assert max(later) < first + seen["tensors"]  # in 45 calls more, some 10 of them the largest
    assert max(later) < 5 * seen["tensors"]
    assert min(later) > seen["tensors"] / 2, f"given back: off the list: {KEEPS_MEMORY['litert']}"


THREADS = """
engine, x = ("onnxruntime", x) if path.suffix == ".onnx" else ("litert", np.zeros((1, 8, 8, 1), np.float32))
ours(engine)(x)  # a library may start threads of its own when it is imported
found = {}
for asked in (1, 2, 3):
    before = threads()
    call = ours(engine, threads=asked)
    call(x)
    found[asked] = threads() - before
    del call
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_an_engine_starts_no_more_threads_than_it_was_told(wide: Path, tmp_path: Path, kind: str) -> None:
    path = wide
    if kind == "tflite":
        path = tmp_path / "m.tflite"
        path.write_bytes(tinymodels.classifier_tflite(tinymodels.weights()))
    started = measured(THREADS, path)
    assert {int(asked): more <= int(asked) - 1 for asked, more in started.items()} == {1: True, 2: True, 3: True}


INSTALL = """
import outrider
report = outrider.install(path, state=path.parent / "state")
print(json.dumps({"cpus": report.board["cpus"], "threads": sorted({row.threads for row in report.measured})}))
"""


def test_bound_to_one_processor_nothing_is_tried_with_two_threads(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    one = {min(os.sched_getaffinity(0))}
    assert measured(INSTALL, tmp_path / "b.outrider", cpus=one) == {"cpus": 1, "threads": [1]}


def test_a_strangers_engine_has_no_gaps_that_the_conformance_suite_knows() -> None:
    assert gap_of("a-strangers", "same-uint16") is None
    assert gap_of("tflite_runtime", "same-uint16")
