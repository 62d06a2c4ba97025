"""Bundles that were made for something else: refused at install, typed, and what was installed answers as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from outrider.bundle import open_bundle, thin_bundle
from outrider.installer import install
from outrider.model import load
from outrider_runtimes.errors import AdmissionError, NoEngine, OutriderError, UnsupportedBundle
from support import tinymodels
from support.bundles import assemble, manifest_data
from support.realbundles import ONNX, TFLITE, expected, images, make_real_bundle

X = images(3)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A board on which version 1 serves."""
    make_real_bundle(tmp_path / "1.outrider", version=1, seed=1)
    install(tmp_path / "1.outrider", state=tmp_path / "state")
    return tmp_path / "state"


def refused(state: Path, path: Path, kind: type[OutriderError]) -> OutriderError:
    record = (state / "names/tiny.json").read_bytes()
    with pytest.raises(kind) as caught:
        install(path, state=state)
    assert caught.value.hint
    assert (state / "names/tiny.json").read_bytes() == record
    assert list((state / "tmp").iterdir()) == []
    with load("tiny", state=state) as model:
        prediction = model.infer(X)
        assert model.bundle.version == 1
        assert np.allclose(prediction.outputs["logits"], expected(X, 1), atol=1e-3)
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(("newer", "says"), [("opset", "Opset 999 is under"), ("IR", "model IR version: 999, max")])
def test_an_onnx_file_of_a_newer_standard_than_the_engines(tmp_path: Path, state: Path, newer: str, says: str) -> None:
    model = onnx.load_from_string(tinymodels.classifier_onnx(tinymodels.weights(2)))
    if newer == "opset":
        model.opset_import[0].version = 999
    else:
        model.ir_version = 999
    path = tmp_path / "2.outrider"
    make_real_bundle(path, version=2, seed=2, files={"onnx": model.SerializeToString()})
    error = refused(state, path, AdmissionError)
    assert "tiny version 2: no variant could be loaded here (onnx-float32 on onnxruntime:" in str(error)
    assert says in str(error)


@pytest.mark.slow
def test_a_thin_bundle_whose_one_variant_runs_on_no_engine_here(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_real_bundle(tmp_path / "whole.outrider", version=2, seed=2, formats=("onnx", "tflite"))
    thin_bundle(tmp_path / "whole.outrider", tmp_path / "thin.outrider", variants=[TFLITE])
    for package in ("ai_edge_litert", "tflite_runtime"):  # a board that has neither, as its first run sees it
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text("raise ImportError('not on this board')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    error = refused(state, tmp_path / "thin.outrider", NoEngine)
    assert f"{ONNX}: its file is not in this thin bundle" in str(error)
    assert "not on this board" in str(error)


@pytest.mark.slow
def test_a_bundle_that_requires_what_this_board_has_not(tmp_path: Path, state: Path) -> None:
    make_real_bundle(tmp_path / "2.outrider", version=2, seed=2)
    with open_bundle(tmp_path / "2.outrider") as bundle:
        members = [bundle.read(member.path) for member in bundle.manifest.members]
    manifest = {**manifest_data(tmp_path / "2.outrider"), "requires": ["cpu:sve2"]}
    assemble(tmp_path / "sve2.outrider", manifest, members)
    error = refused(state, tmp_path / "sve2.outrider", UnsupportedBundle)
    assert "'cpu:sve2'" in str(error)
