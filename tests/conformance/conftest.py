"""Model files for the conformance suite, each made once a session and only when a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from conformance.known_gaps import UNSTEADY, gap_of
from outrider_runtimes.engines import Engine, find_engines
from support import models, tflitefiles

ModelFile = Callable[[str], Path]
Gap = Callable[[str], AbstractContextManager[None]]


def write_model(folder: Path, name: str) -> Path:
    """``onnx-linear``, ``tflite-same-int8``: that file in ``folder``."""
    path = folder / name
    format_, kind, *options = name.split("-")
    source = models if format_ == "onnx" else tflitefiles
    if kind == "fixed":
        return source.__dict__[f"{format_}_linear"](path, rows=int(options[0]))
    return source.__dict__[f"{format_}_{kind}"](path, *options)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """``model_file("tflite-linear")``: the path of that file.

    Where ``CONFORMANCE_MODELS`` names a folder they are taken from there: an environment with one engine has nothing
    to write them with.
    """
    given = os.environ.get("CONFORMANCE_MODELS")
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if given is not None:
            return Path(given, name)
        return folder / name if (folder / name).exists() else write_model(folder, name)

    return make


@pytest.fixture(params=find_engines(), ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn; skipped, naming what is missing, where it is not installed."""
    reason = request.param.check()
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def gap(engine: Engine) -> Gap:
    """``with gap("same-uint16"):`` around what an engine may be unable to do; it fails where a listed case works."""

    @contextmanager
    def expected(case: str) -> Iterator[None]:
        reason = gap_of(engine.name, case)
        try:
            yield
        except Exception:
            if reason is None:
                raise
            pytest.xfail(f"known gap: {reason}")
        if reason is not None and (engine.name, case) not in UNSTEADY:
            pytest.fail(f"{case} works on {engine.name} now: take it off the list of known gaps")

    return expected
