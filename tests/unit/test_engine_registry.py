"""Which engines there are, without importing any; and what a user reads when one is missing or broken."""

from __future__ import annotations

import subprocess
import sys

import pytest

from outrider_runtimes import engines
from outrider_runtimes.engines import engine_named, engines_for, find_engines, require_engines
from outrider_runtimes.engines import onnxruntime as onnxruntime_module
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.engines.litert import LiteRtEngine
from outrider_runtimes.errors import MissingExtra, NoEngine

ABSENT = Library(
    package="outrider_absent_engine", module="outrider_absent_engine.api", distribution="absent", extra="onnx"
)


def test_the_engines_and_their_formats():
    assert {e.name: tuple(e.formats) for e in find_engines()} == {
        "onnxruntime": ("onnx",),
        "litert": ("tflite",),
        "tflite_runtime": ("tflite",),
    }


def test_finding_them_imports_no_engine():
    code = (
        "import sys; from outrider_runtimes.engines import find_engines; find_engines();"
        "heavy = {'onnxruntime', 'ai_edge_litert', 'tflite_runtime', 'torch', 'onnx'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def test_an_engine_is_found_by_its_name_and_another_name_says_what_there_is():
    assert engine_named("litert").name == "litert"
    with pytest.raises(NoEngine, match="tensorrt") as caught:
        engine_named("tensorrt")
    assert caught.value.hint == (
        "the engines are onnxruntime, litert, tflite_runtime, onnxruntime-tensorrt, onnxruntime-cuda"
    )


def test_for_a_format():
    assert [e.name for e in engines_for("onnx")] == ["onnxruntime"]
    assert engines_for("tflite")[0].name == "litert"
    assert engines_for("gguf") == ()
    with pytest.raises(NoEngine, match="gguf"):
        require_engines("gguf")


def test_a_missing_library_names_the_pip_command(monkeypatch, tmp_path):
    monkeypatch.setattr(onnxruntime_module, "LIBRARY", ABSENT)
    engine = engine_named("onnxruntime")
    assert engine.check() == "absent is not installed; pip install 'outrider[onnx]'"
    assert engines_for("onnx") == ()
    with pytest.raises(NoEngine, match="onnxruntime: absent is not installed") as none:
        require_engines("onnx")
    assert none.value.hint == "pip install 'outrider[onnx]'"
    with pytest.raises(MissingExtra, match="'absent'") as missing:
        engine.prepare(tmp_path / "m.onnx", threads=1)
    assert missing.value.hint == "pip install 'outrider[onnx]'"
    with pytest.raises(MissingExtra):
        engine.version()


@pytest.mark.parametrize(
    "failure", ["raise ImportError('libgomp.so.1:\\n no such file')", "raise AttributeError('_ARRAY_API')", "1/0"]
)
def test_a_library_that_does_not_import_says_so(monkeypatch, tmp_path, failure):
    (tmp_path / "outrider_broken_engine.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    broken = Library(
        package="outrider_broken_engine", module="outrider_broken_engine", distribution="broken", extra="tflite"
    )
    monkeypatch.setattr(LiteRtEngine, "library", broken)
    reason = engine_named("litert").check()
    assert reason is not None
    assert reason.startswith("broken is installed but does not import: ")
    assert "\n" not in reason
    assert "pip install" in reason
    with pytest.raises(NoEngine):
        engine_named("litert").prepare(tmp_path / "m.tflite", threads=1)


def test_require_engines_gives_what_engines_for_gives():
    assert [e.name for e in require_engines("onnx")] == [e.name for e in engines_for("onnx")]


def test_one_line_is_short_and_one():
    text = one_line(ValueError("a\n  b\t c" + "x" * 1000))
    assert text.startswith("a b cx")
    assert len(text) == 300
    assert text.endswith("...")


def test_the_public_names():
    for name in ("Engine", "Session", "FileTensor", "find_engines", "engine_named", "engines_for", "require_engines"):
        assert hasattr(engines, name)
