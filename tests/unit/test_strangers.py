"""Engines of strangers that misbehave: a typed error, a line of doctor's, and nobody else is taken down."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from outrider import doctor
from outrider.admit.strangers import broken_strangers
from outrider.doctor import Check, Patient
from outrider.installer import install
from outrider.model import load
from outrider_runtimes.engines import engine_named, find_engines, strange_engine, strange_names
from outrider_runtimes.engines._stranger import StrangeEngine
from outrider_runtimes.errors import InferenceError, ModelLoadError, NoEngine
from support.realbundles import images, make_real_bundle
from support.strangers import distribute

OURS = ["onnxruntime", "litert", "tflite_runtime"]
ENGINE = """
from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine
class E:
    name, formats = 's', ('onnx',)
    def check(self): return None
    def prepare(self, path, *, threads, cache=None): return OnnxRuntimeEngine().prepare(path, threads=threads)
"""
NO_ENGINES = {
    "exits": ("import sys\nsys.exit(7)\n", "cannot be loaded: 7"),
    "raises": ("raise RuntimeError('no driver')\n", "cannot be loaded: no driver"),
    "leaves without a word": ("raise BaseException\n", "cannot be loaded: BaseException"),
    "gives nothing": ("def E(): return None\n", "it has no name, formats, check, prepare"),
    "has no formats": ("class E:\n    name = 's'\n    check = prepare = print\n", "it has no formats"),
    "has no name": (ENGINE.replace("'s'", "None"), "it has no name"),
    "has a number for a name": (ENGINE.replace("'s'", "7"), "its name is 7"),
    "is named as ours": (ENGINE.replace("'s'", "'onnxruntime'"), "is an engine's of Outrider"),
    "has one format as a text": (ENGINE.replace("('onnx',)", "'onnx'"), "its formats are 'onnx'"),
}
DEADLY = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, *, module: str) -> None:
    distribute(folder, monkeypatch, module, source, f"s = {module}:E")


def engine_checks(tmp_path: Path) -> dict[str, Check]:
    patient = Patient(root=tmp_path / "root", environ={}, synchronised=lambda: True)
    return {check.name: check for check in doctor._engines(patient)}


@pytest.mark.parametrize("way", NO_ENGINES)
def test_what_is_no_engine_is_told_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    source, why = NO_ENGINES[way]
    put(tmp_path, monkeypatch, source, module=f"strange_{list(NO_ENGINES).index(way)}")
    assert strange_names() == ("s",)
    with caplog.at_level(logging.WARNING):
        assert [engine.name for engine in find_engines(tmp_path)] == OURS
    assert why in caplog.text
    with pytest.raises(NoEngine, match="the engine 's' of strange_") as caught:
        engine_named("s")
    assert "pip uninstall strange_" in caught.value.hint


def test_an_interrupt_is_no_fault_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, "raise KeyboardInterrupt\n", module="strange_interrupt")
    with pytest.raises(KeyboardInterrupt):
        strange_engine("s")


def test_builds_and_version_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, ENGINE, module="strange_plain")
    engine = engine_named("s")
    assert (engine.check(), engine.version(), engine.builds, engine.formats) == (None, "1.0", False, ("onnx",))


class Session:
    """As a stranger's: it answers with what it is given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.inputs, self.outputs, self.input_names, self.output_names = (), (), ("x",), ("y",)

    def run(self, _: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        raise RuntimeError("already closed")


def strange(**methods: Any) -> StrangeEngine:
    given = SimpleNamespace(**{"check": lambda: None, **methods})
    return StrangeEngine(engine=given, name="s", formats=("onnx",), builds=False, distribution="1.0")


def raising(error: Exception) -> Any:
    def method(*_: Any, **__: Any) -> Any:
        raise error

    return method


def test_what_its_methods_raise_is_typed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "its check failed: driver gone; ask" in str(strange(check=raising(RuntimeError("driver gone"))).check())
    no_version = strange(version=raising(RuntimeError("driver gone")))
    assert "driver gone" in str(no_version.check())
    with pytest.raises(NoEngine, match="driver gone"):
        no_version.version()
    for prepare in (raising(OSError("no device")), lambda *_, **__: None):
        with pytest.raises(ModelLoadError, match=r"engine 's' failed to load m\.onnx"):
            strange(prepare=prepare).prepare(tmp_path / "m.onnx", threads=1)
    answers = [RuntimeError("driver lost"), [[1.0]], [], None, [np.zeros(1), np.zeros(1)]]
    for answer in answers:
        session = strange(prepare=lambda *_, answer=answer, **__: Session(answer)).prepare(tmp_path, threads=1)
        with pytest.raises(InferenceError, match="engine 's'"):
            session.run([])
    session.close()
    assert "already closed" in caplog.text


@pytest.mark.slow
def test_one_that_loads_nothing_is_left_out_and_one_whose_check_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ENGINE + "    def prepare(self, path, *, threads, cache=None): raise RuntimeError('no device')\n"
    distribute(tmp_path, monkeypatch, "strange_prepare", source, "s = strange_prepare:E")
    source = ENGINE.replace("'s'", "'c'") + "    def check(self): raise RuntimeError('driver gone')\n"
    distribute(tmp_path, monkeypatch, "strange_check", source, "c = strange_check:E")
    make_real_bundle(tmp_path / "1.outrider")
    report = install(tmp_path / "1.outrider", state=tmp_path / "state")
    assert {row.engine for row in report.measured} == {"onnxruntime"}
    reasons = {row.engine: row.reason for row in report.skipped}
    assert "no device" in reasons["s"]
    assert "driver gone" in reasons["c"]
    checks = engine_checks(tmp_path)
    assert checks["engine s"].status == "ok"
    assert (checks["engine c"].status, checks["engine c"].cause) == ("broken", "its check failed: driver gone")
    assert checks["engine c"].cure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "why"),
    [
        (DEADLY, f"exit code {-signal.SIGSEGV}"),
        ("import os\nos._exit(0)\n", "kills the process (exit code 0)"),
        ("import sys\nsys.exit(7)\n", "cannot be loaded: 7"),
    ],
    ids=["segfault", "silent exit", "exit"],
)
def test_one_that_dies_at_import_is_seen_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    """Were it imported here, this test would be gone with its process."""
    put(tmp_path, monkeypatch, source, module=f"strange_deadly_{len(source)}")
    assert why in broken_strangers()["s"][0]
    make_real_bundle(tmp_path / "1.outrider")
    report = install(tmp_path / "1.outrider", state=tmp_path / "state")
    assert why in {row.engine: row.reason for row in report.skipped}["s"]
    with load("tiny", state=tmp_path / "state") as model:
        assert model.infer(images(1)).engine == "onnxruntime"
    check = engine_checks(tmp_path)["engine s"]
    assert check.status == "broken"
    assert why in check.cause
    assert check.cure


@pytest.mark.slow
def test_a_driver_that_is_lost_in_a_call_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine
class P:
    def __init__(self, s):
        self.s = s
        self.inputs, self.outputs = s.inputs, s.outputs
        self.input_names, self.output_names = s.input_names, s.output_names
    def run(self, x):
        if x[0].max() > 50: raise RuntimeError('driver lost')
        return self.s.run(x)
    def close(self): self.s.close()
class E:
    name, formats = 's', ('onnx',)
    def check(self): return None
    def prepare(self, path, *, threads, cache=None): return P(OnnxRuntimeEngine().prepare(path, threads=threads))
"""
    put(tmp_path, monkeypatch, source, module="strange_lost")
    make_real_bundle(tmp_path / "1.outrider")
    install(tmp_path / "1.outrider", state=tmp_path / "state")
    for isolation in ("thread", "process"):
        with load("tiny", state=tmp_path / "state", engine="s", isolation=isolation) as model:  # type: ignore[arg-type]
            assert model.infer(images(1)).engine == "s"
            with pytest.raises(InferenceError, match="driver lost"):
                model.infer(images(1) * np.float32(100))
            assert model.infer(images(1)).engine == "s"
