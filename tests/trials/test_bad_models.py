"""Bad model files in the real admission child: the caller lives, the error is typed, no file outside is read, and what
was active answers as before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support import tinymodels
from support.mutants import INSTALL_EVERY, Active, Ground, mutants, tight_limits, write_results
from support.opened import watched
from support.tflitefiles import Operator, Tensor, write_tflite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FULL, SHARE = 600, 40  # mutants of each format: for `make trials`, and for `make test`
W = tinymodels.weights()
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def active(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Active]:
    with Active(tmp_path_factory.mktemp("active")) as active:
        yield active


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that no model may read: weights as a file, and all the ways to it."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "weights.bin"
    weights.write_bytes(W.dense_bias.tobytes())
    (tmp_path / "above.bin").write_bytes(W.dense_bias.tobytes())
    (folder / "symlink.bin").symlink_to(tmp_path / "above.bin")
    os.link(tmp_path / "above.bin", folder / "hardlink.bin")
    (folder / "up").symlink_to(tmp_path)
    return folder


def external(location: str) -> bytes:
    """The classifier, with the bias of its last layer in another file."""
    model = onnx.ModelProto.FromString(tinymodels.classifier_onnx(W))
    tensor = next(each for each in model.graph.initializer if each.name == "dense_bias")
    size = len(numpy_helper.to_array(tensor).tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


TRICKS = {
    "a file beside it": lambda folder: "weights.bin",
    "a file above it": lambda folder: "../above.bin",
    "an absolute path": lambda folder: str(folder / "weights.bin"),
    "a symbolic link": lambda folder: "symlink.bin",
    "a hard link": lambda folder: "hardlink.bin",
    "a linked folder": lambda folder: "up/above.bin",
    "a detour": lambda folder: f"./up/{folder.name}/../above.bin",
}


def test_the_watch_sees_an_open_by_any_way(outside: Path) -> None:
    for way in ("../above.bin", "symlink.bin", "hardlink.bin", "up/above.bin"):
        with watched([outside.parent / "above.bin"]) as opened:
            (outside / way).read_bytes()
        assert opened == [outside.parent / "above.bin"]
    with watched([outside.parent / "above.bin"]) as opened:
        (outside / "weights.bin").read_bytes()
    assert opened == []


@pytest.mark.parametrize("trick", TRICKS)
def test_external_data_is_refused_and_not_opened(outside: Path, active: Active, trick: str) -> None:
    ground = Ground.make(outside, "onnx")
    path = outside / "tricky.onnx"
    path.write_bytes(external(TRICKS[trick](outside)))
    with watched([outside / "weights.bin", outside.parent / "above.bin"]) as opened:
        assert ground.admitted(path) == "AdmissionError"
    assert opened == []
    assert active.answers()


def sources(ground: Ground, format_: str, folder: Path) -> list[bytes]:
    """What is mutated: the good file; of ONNX one too that names files outside, a byte or two from being believed."""
    if format_ == "tflite":
        return [ground.model]
    return [ground.model, external(str(folder / "weights.bin")), external("../above.bin")]


def try_mutants(format_: str, count: int, outside: Path, active: Active, *, side_by_side: int = 1) -> dict[str, int]:
    ground = Ground.make(outside, format_)
    tries = mutants(sources(ground, format_, outside), count, seed=count)
    with watched([outside / "weights.bin", outside.parent / "above.bin"]) as opened:
        outcomes = ground.outcomes(tries, active, side_by_side=side_by_side)
    assert opened == []
    assert sum(outcomes.values()) == count
    return dict(sorted(outcomes.items()))


def test_a_mutant_may_be_admitted_and_is_gone_back_from(outside: Path, active: Active) -> None:
    assert active.install("onnx", Ground.make(outside, "onnx").model) == "admitted"
    assert active.install("onnx", b"no model") == "AdmissionError"
    assert active.answers()


@pytest.mark.parametrize("format_", ["onnx", "tflite"])
def test_a_share_of_the_mutants(format_: str, outside: Path, active: Active) -> None:
    outcomes = try_mutants(format_, SHARE, outside, active)
    assert any("Admission" in outcome for outcome in outcomes)


@pytest.mark.trials
@pytest.mark.parametrize("format_", ["onnx", "tflite"])
def test_all_mutants(format_: str, outside: Path, active: Active) -> None:
    begun = time.monotonic()
    outcomes = try_mutants(format_, FULL, outside, active, side_by_side=CORES)
    taken_s = round(time.monotonic() - begun, 1)
    counts = {"mutants": FULL, "outcomes": outcomes, "by_install": FULL // INSTALL_EVERY}
    write_results(f"mutants-{format_}", {**counts, "files_outside_opened": 0, "taken_s": taken_s})


def huge_tflite(folder: Path) -> bytes:
    """A tensor of 2^52 float32, filled with ones, beside the answer."""
    path = write_tflite(
        folder / "huge.tflite",
        [
            Tensor(name="x", shape=(1, 8, 8, 1)),
            Tensor(name="sizes", dtype="int32", shape=(2,), data=np.array([2**26, 2**26], np.int32)),
            Tensor(name="one", shape=(), data=np.ones((), np.float32)),
            Tensor(name="ones", shape=(2**26, 2**26)),
            Tensor(name="ten", dtype="int32", shape=(2,), data=np.array([1, 64], np.int32)),
            Tensor(name="y", shape=(1, 64)),
        ],
        [
            Operator(kind="FILL", inputs=["sizes", "one"], outputs=["ones"]),
            Operator(kind="RESHAPE", inputs=["x", "ten"], outputs=["y"]),
        ],
        inputs={"x": "x"},
        outputs={"y": "y"},
    )
    return path.read_bytes()


def endless_constant_onnx() -> bytes:
    """Counts to 2^62 while it is loaded: the loop's inputs are all constants."""
    constants = {"trips": np.array(2**62, np.int64), "true": np.array(True), "start": np.float32([0.0])}
    return tinymodels.classifier_onnx(
        W,
        extra=[
            tinymodels.endless_loop("start", "nothing"),
            helper.make_node("Add", ["logits", "nothing"], ["y"]),
        ],
        extra_initializers=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )


MONSTERS: dict[str, tuple[str, Callable[[Path], bytes], set[str]]] = {
    "one that hangs": ("onnx", lambda _: tinymodels.endless_onnx(W), {"AdmissionHang"}),
    "one that hangs on constants": ("onnx", lambda _: endless_constant_onnx(), {"AdmissionHang"}),
    "2^52 bytes": ("onnx", lambda _: tinymodels.hungry_onnx(W, elements=2**50), {"AdmissionError", "AdmissionLimit"}),
    "2^52 numbers in TFLite": ("tflite", huge_tflite, {"AdmissionError", "AdmissionCrash", "AdmissionLimit"}),
    "8 GiB": ("onnx", lambda _: tinymodels.hungry_onnx(W, elements=2**31), {"AdmissionLimit", "AdmissionError"}),
}


@pytest.mark.parametrize("name", MONSTERS)
def test_one_that_hangs_or_eats_memory(outside: Path, active: Active, name: str) -> None:
    format_, make, allowed = MONSTERS[name]
    ground = Ground.make(outside, format_)
    path = outside / "monster"
    path.write_bytes(make(outside))
    # What hangs is let run a little; memory may take its time to fill on a machine that is busy.
    limits = tight_limits(wall_s=5.0 if allowed == {"AdmissionHang"} else 120.0)
    assert ground.admitted(path, limits=limits) in allowed
    assert active.answers()
