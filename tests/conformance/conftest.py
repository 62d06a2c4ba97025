"""Model files for the conformance suite, each made once a session and only when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.known_gaps import KNOWN_GAPS
from outrider_runtimes.engines import Engine, find_engines
from support import models

ModelFile = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """``model_file("tflite-linear")``: the path of that file."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        path = folder / name
        if path.exists():
            return path
        format_, _, kind = name.partition("-")
        if kind.startswith("dtype-"):
            build = models.onnx_identity if format_ == "onnx" else models.tflite_add_one
            return build(path, kind.removeprefix("dtype-"))
        if name == "tflite-int8":
            return models.tflite_int8(path, make("tflite-linear"))
        return getattr(models, f"{format_}_{kind}")(path)

    return make


@pytest.fixture(params=find_engines(), ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn; skipped, naming what is missing, where it is not installed."""
    reason = request.param.check()
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def gaps(engine: Engine) -> dict[str, str]:
    """The written list of what this engine cannot do."""
    return KNOWN_GAPS[engine.name]
