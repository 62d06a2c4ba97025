"""The ways of ONNX Runtime onto a GPU, as far as they show without one; and engines of strangers."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from outrider.admit import admit
from outrider.admit.supervise import Limits
from outrider.bundle import Trust, open_bundle
from outrider.installer import install
from outrider.model import load
from outrider.store import Store
from outrider_runtimes.engines import engine_named, find_engines, onnxruntime
from outrider_runtimes.engines.onnxruntime import (
    ACCELERATED,
    CPU,
    CUDA,
    TENSORRT,
    OnnxRuntimeEngine,
    has_gpu_library,
    provider_options,
)
from outrider_runtimes.errors import NoEngine
from support import tinymodels
from support.realbundles import ONNX, expected, images, make_real_bundle
from support.strangers import distribute

STRANGER = """
from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine

class Stranger:
    name, formats, builds = "stranger", ("onnx",), True

    def check(self):
        return None

    def version(self):
        return "7.0"

    def prepare(self, path, *, threads, cache=None):
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / "plan").write_text("built for " + path.name)
        return OnnxRuntimeEngine().prepare(path, threads=threads)
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with an engine."""
    distribute(tmp_path, monkeypatch, "stranger_engine", STRANGER, "stranger = stranger_engine:Stranger")


@pytest.mark.parametrize("node", ["nvidia0", "nvhost-gpu"])
def test_the_ways_onto_a_gpu_come_first_where_there_is_one(tmp_path: Path, node: str) -> None:
    assert {engine.name for engine in find_engines(tmp_path)} == {"onnxruntime", "litert", "tflite_runtime"}
    assert not has_gpu_library()  # the wheel for the processor is installed here
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / node).touch()
    names = [engine.name for engine in find_engines(tmp_path)]
    assert names[:3] == ["onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime"]
    assert [engine.providers for engine in ACCELERATED] == [(TENSORRT, CUDA, CPU), (CUDA, CPU)]
    assert [engine.builds for engine in find_engines(tmp_path)] == [True, False, False, False, False]


@pytest.mark.parametrize("engine", ACCELERATED, ids=lambda engine: engine.name)
def test_a_provider_that_this_onnxruntime_lacks_is_named_with_those_it_has(engine) -> None:
    reason = engine_named(engine.name).check()
    assert reason is not None
    assert reason.startswith(f"{engine.providers[0]} is not among this onnxruntime's providers (")
    assert CPU in reason and "onnxruntime-gpu" in reason


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("engine", ACCELERATED, ids=lambda engine: engine.name)
def test_a_way_never_goes_on_without_its_first_provider(tmp_path: Path, engine) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(tinymodels.classifier_onnx(tinymodels.weights()))
    with pytest.raises(NoEngine, match=f"{engine.providers[0]} is not among this onnxruntime's providers"):
        engine.prepare(path, threads=1, cache=tmp_path / "cache")


def test_the_file_that_asks_whether_a_provider_starts_gives_back_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "same.onnx").write_bytes(onnxruntime._PASS_THROUGH)
    session = OnnxRuntimeEngine().prepare(tmp_path / "same.onnx", threads=1)
    assert session.run([np.float32([2.5])])[0].tolist() == [2.5]


def test_tensorrt_alone_is_told_where_to_keep_what_it_builds(tmp_path: Path) -> None:
    told = provider_options(TENSORRT, tmp_path)
    assert told["trt_engine_cache_enable"] == "1"
    assert told["trt_engine_cache_path"] == told["trt_timing_cache_path"] == str(tmp_path)
    assert provider_options(TENSORRT, None) == provider_options(CUDA, tmp_path) == provider_options(CPU, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("stranger")
def test_a_strangers_engine_is_measured_serves_and_keeps_what_it_builds(tmp_path: Path) -> None:
    assert [engine.name for engine in find_engines()][-1] == "stranger"
    make_real_bundle(tmp_path / "1.outrider", seed=1)
    state = tmp_path / "state"
    report = install(tmp_path / "1.outrider", state=state)
    assert {row.engine for row in report.measured} == {"onnxruntime", "stranger"}
    assert report.engines["stranger"] == "7.0"
    installed = Store(state).installed("tiny")
    member = installed.manifest.variant(ONNX).member
    plan = installed.build_path(member) / "plan"
    assert plan.read_text() == f"built for {installed.blob_path(member).name}"
    plan.unlink()
    for isolation in ("thread", "process"):
        with load("tiny", state=state, engine="stranger", isolation=isolation) as model:  # type: ignore[arg-type]
            assert model.engine == "stranger"
            assert np.allclose(model.predict(images())["logits"], expected(images(), 1), atol=1e-4)
            assert plan.exists()
            plan.unlink()
    for version in (2, 3):
        make_real_bundle(tmp_path / "next.outrider", version=version, seed=version)
        with Store(state).add(tmp_path / "next.outrider", Trust()) as staged:
            Store(state).activate(staged, installed.choice)
    assert not plan.parent.exists()  # its member is gone


@pytest.mark.usefixtures("stranger")
def test_an_engine_that_builds_gets_more_time_for_each_of_its_variants(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    limits = Limits(rss_bytes=1, wall_s=10.0, cpu_s=20.0, build_s=100.0)
    with open_bundle(tmp_path / "b.outrider") as bundle:
        more = admit._with_builds(limits, bundle.manifest, find_engines())
    assert (more.wall_s, more.cpu_s) == (110.0, 120.0)


@pytest.mark.parametrize("entry", ["broken = broken_engine:Missing", "broken = no_such_module:Engine"])
def test_an_engine_that_cannot_be_loaded_takes_no_other_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, entry: str
) -> None:
    distribute(tmp_path, monkeypatch, "broken_engine", "", entry)
    with caplog.at_level(logging.WARNING):
        assert {engine.name for engine in find_engines()} == {"onnxruntime", "litert", "tflite_runtime"}
    assert "the engine 'broken'" in caplog.text
