"""Load what is installed, or a path: what is opened, what may be asked for, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outrider
from outrider.hybrid import Hybrid
from outrider.installer import install
from outrider.model import BundleInfo, Model, load
from outrider.policy import Policy
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    MissingExtra,
    NoEngine,
    NotFiniteError,
    NotInstalled,
    OutriderError,
    StateDirectoryError,
    StoreError,
)
from support.realbundles import INTERFACE, ONNX, TFLITE, close_to, images, make_real_bundle


def test_load_by_name_starts_no_process_and_hashes_no_member(tiny_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import subprocess

    hashed: list[int] = []
    real = hashlib.sha256

    def counting(data: bytes = b"", **kwargs: Any) -> Any:
        hashed.append(len(data))
        return real(data, **kwargs)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(hashlib, "sha256", counting)
    with load("tiny", state=tiny_state) as model:
        assert close_to(model.predict(images()), images())
    assert len(hashed) <= 3  # the manifest, and what names it


def test_what_a_loaded_model_says_of_itself(tiny_state: Path, model: Model) -> None:
    report = json.loads((tiny_state / "names" / "tiny.json").read_text())
    assert model.interface == INTERFACE
    assert isinstance(model.bundle, BundleInfo)
    assert (model.bundle.name, model.bundle.version, model.bundle.verified) == ("tiny", 1, False)
    assert len(model.bundle.digest) == 64 and model.bundle.digest in json.dumps(report)
    assert model.variant in (ONNX, TFLITE)
    assert model.threads >= 1
    assert model.variant in repr(model)


def test_a_path_is_installed_first_and_found_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "b.outrider"
    make_real_bundle(path)
    for source in (path, str(path)):
        with load(source, state=tmp_path / "state") as model:
            assert close_to(model.predict(images()), images())
    record = (tmp_path / "state/names/tiny.json").stat()
    with load(path, state=tmp_path / "state"):
        pass
    assert (tmp_path / "state/names/tiny.json").stat().st_mtime_ns == record.st_mtime_ns
    make_real_bundle(path, version=2, seed=9)
    with load(path, state=tmp_path / "state") as model:
        assert model.bundle.version == 2
        assert close_to(model.predict(images()), images(), seed=9)


def test_a_damaged_store_is_healed_by_loading_the_path(tmp_path: Path) -> None:
    path, state = tmp_path / "b.outrider", tmp_path / "state"
    make_real_bundle(path)
    load(path, state=state).close()
    for blob in (state / "blobs/sha256").iterdir():
        blob.write_bytes(b"")
    with pytest.raises(StoreError):
        load("tiny", state=state)
    with load(path, state=state) as model:
        assert close_to(model.predict(images()), images())


def test_every_engine_and_variant_can_be_asked_for(tiny_state: Path) -> None:
    for engine, variant in (("onnxruntime", ONNX), ("litert", TFLITE)):
        for asked in ({"engine": engine}, {"variant": variant}, {"engine": engine, "variant": variant, "threads": 1}):
            with load("tiny", state=tiny_state, **asked) as model:  # type: ignore[arg-type]
                assert (model.engine, model.variant) == (engine, variant)
                assert close_to(model.predict(images()), images())
    with load("tiny", state=tiny_state, threads=3) as model:
        assert model.threads == 3


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"variant": "onnx-int8"}, ConfigError, "onnx-int8"),
        ({"engine": "tensorrt-llm"}, NoEngine, "tensorrt-llm"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"finite": "zero"}, ConfigError, "finite is 'zero', expected 'reject' or 'clip' or 'pass'"),
        ({"engine": "onnxruntime", "variant": TFLITE}, NoEngine, f"{TFLITE} on onnxruntime"),
        ({"engine": "tflite_runtime"}, NoEngine, "not installed"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    tiny_state: Path, asked: dict[str, Any], error: type[OutriderError], says: str
) -> None:
    with pytest.raises(error, match=says) as info:
        load("tiny", state=tiny_state, **asked)
    assert info.value.hint or {"threads", "finite"} & set(asked)


def test_the_policy_for_infinities_is_asked_for_at_load(tiny_state: Path) -> None:
    """The interface's range is 0 to 1, so that clip answers as for an image of ones."""
    endless = np.full_like(images(2), np.inf)
    with load("tiny", state=tiny_state) as model, pytest.raises(NotFiniteError):
        model.infer(endless)
    with load("tiny", state=tiny_state, finite="clip") as model:
        clipped = model.predict(endless)
        assert clipped["logits"].tobytes() == model.predict(np.ones_like(endless))["logits"].tobytes()
        assert model.submit({"image": endless}, Deadline.after_ms(120_000)).result(120).outputs.keys() == clipped.keys()
        with pytest.raises(NotFiniteError, match="NaN"):
            model.infer(endless * 0)
        with Hybrid(model, model, Policy(60_000.0)) as hybrid:
            assert hybrid.infer(endless).outputs["logits"].tobytes() == clipped["logits"].tobytes()
    with load("tiny", state=tiny_state, finite="pass") as model:
        assert not np.isfinite(model.predict(endless)["logits"]).any()


def test_an_unknown_name_says_what_is_installed(
    tiny_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotInstalled, match="huge") as info:
        load("huge", state=tiny_state)
    assert "tiny" in info.value.hint
    (tmp_path / "huge").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotInstalled) as info:
        load("huge", state=tiny_state)
    assert "./huge" in info.value.hint


def test_an_engine_that_is_gone_is_replaced_by_the_next_best(
    tiny_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with load("tiny", state=tiny_state) as chosen:
        package = {"litert": "ai_edge_litert", "onnxruntime": "onnxruntime"}[chosen.engine]
        gone = chosen.engine
    uninstall(package, monkeypatch)
    with caplog.at_level(logging.WARNING), load("tiny", state=tiny_state) as model:
        assert model.engine != gone
        assert close_to(model.predict(images()), images())
    assert f"{gone} was measured best for tiny but is gone" in caplog.text
    with pytest.raises(MissingExtra) as info:
        load("tiny", state=tiny_state, engine=gone)
    assert "pip install" in info.value.hint


def uninstall(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `find_spec(package)` and its import fail, as where it is not installed."""
    import importlib.util
    import sys

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=None: None if name == package else real(name, p))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("asked", [{"isolation": "thraed"}, {"drop": "all"}, {"finite": "zero"}])
def test_a_word_that_an_option_does_not_have_is_refused_before_anything_is_opened(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Nothing of that name is installed, and no bundle is at that path: neither is looked for."""
    for source in ("tiny", tmp_path / "tiny.outrider"):
        with pytest.raises(ConfigError, match="expected '"):
            load(source, state=tmp_path, **asked)


def test_the_public_names_are_these_objects() -> None:
    assert outrider.load is load
    assert outrider.install is install
    assert outrider.Model is Model


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**70, "2", 1.5, True])
def test_a_number_of_threads_that_no_board_has_is_refused(tiny_state: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="from 1 to 1024"):
        load("tiny", state=tiny_state, threads=threads)


@pytest.mark.parametrize("name", ["engine", "variant"])
@pytest.mark.parametrize("given", [["litert"], 3, b"litert", {}])
def test_an_engine_or_a_variant_that_is_no_name_is_refused(tiny_state: Path, name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*, expected the name of one"):
        load("tiny", state=tiny_state, **{name: given})


def test_a_name_that_is_too_long_for_a_file_is_not_installed(tiny_state: Path) -> None:
    with pytest.raises(NotInstalled):
        load("x" * 5000, state=tiny_state)


def test_a_state_directory_with_a_null_byte_is_a_typed_error() -> None:
    with pytest.raises(StateDirectoryError, match="null byte"):
        load("tiny", state="a\0b")
