"""Install and go back: real bundles in a real store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.bundle import thin_bundle
from outrider.installer import InstallReport, install, rollback
from outrider.model import load
from outrider_runtimes.errors import (
    AdmissionError,
    IntegrityError,
    NotInstalled,
    StateDirectoryError,
    StoreError,
)
from support import tinymodels
from support.realbundles import ONNX, TFLITE, close_to, images, make_real_bundle


def test_an_install_reports_what_it_chose_and_why(tmp_path: Path) -> None:
    digest = make_real_bundle(tmp_path / "b.outrider", version=4, formats=("onnx", "tflite"))
    report = install(tmp_path / "b.outrider", state=tmp_path / "state")
    assert (report.name, report.version, report.digest) == ("tiny", 4, digest)
    assert report.admitted and not report.verified
    assert {row.variant for row in report.measured} == {ONNX, TFLITE}
    assert report.choice.p50_ms <= 1.02 * min(row.p50_ms for row in report.measured)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["choice"]["variant"] == report.choice.variant
    assert len(again["measured"]) == len(report.measured)


def test_the_same_bundle_again_is_not_run_again(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    first = install(tmp_path / "b.outrider", state=tmp_path)
    second = install(tmp_path / "b.outrider", state=tmp_path)
    assert first.admitted and not second.admitted
    assert second.measured == first.measured
    with pytest.raises(NotInstalled):
        rollback("tiny", state=tmp_path)


def test_more_members_of_the_same_bundle_are_run(tmp_path: Path) -> None:
    digest = make_real_bundle(tmp_path / "whole.outrider", formats=("onnx", "tflite"))
    assert thin_bundle(tmp_path / "whole.outrider", tmp_path / "thin.outrider", variants=[ONNX]) == digest
    thin = install(tmp_path / "thin.outrider", state=tmp_path)
    assert {row.variant for row in thin.measured} == {ONNX}
    assert (TFLITE, "", "its file is not in this thin bundle") in [
        (row.variant, row.engine, row.reason) for row in thin.skipped
    ]
    whole = install(tmp_path / "whole.outrider", state=tmp_path)
    assert whole.admitted and whole.digest == digest
    assert {row.variant for row in whole.measured} == {ONNX, TFLITE}
    assert not install(tmp_path / "thin.outrider", state=tmp_path).admitted
    with load("tiny", state=tmp_path, variant=TFLITE) as model:
        assert close_to(model.predict(images()), images())


SLOW = pytest.mark.slow  # another reason to refuse, by the same way
BAD_FILES = {
    "wrong": {"golden_shift": 0.5},
    "nan": {"files": {"onnx": tinymodels.nan_onnx(tinymodels.weights(1))}},
    "garbage": {"files": {"onnx": b"\xff" * 1000}},
}


@pytest.mark.parametrize(
    "made", [pytest.param(made, id=name, marks=SLOW if name != "wrong" else ()) for name, made in BAD_FILES.items()]
)
def test_a_refused_bundle_leaves_what_was_active_and_nothing_else(
    tmp_path: Path, tiny_state: Path, made: dict[str, Any]
) -> None:
    state = tmp_path / "state"
    shutil.copytree(tiny_state, state)
    before = snapshot(state)
    make_real_bundle(tmp_path / "bad.outrider", version=2, seed=1, **made)
    with load("tiny", state=state) as model:
        wanted = model.predict(images())["logits"]
        with pytest.raises(AdmissionError):
            install(tmp_path / "bad.outrider", state=state)
        assert np.array_equal(model.predict(images())["logits"], wanted)
    assert snapshot(state) == before
    with load("tiny", state=state) as model:
        assert np.array_equal(model.predict(images())["logits"], wanted)
        assert model.bundle.version == 1


def snapshot(state: Path) -> dict[str, bytes]:
    files = (path for path in state.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(state)): path.read_bytes() for path in files}


def test_nothing_is_written_for_a_first_bundle_that_is_refused(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "bad.outrider", golden_shift=0.5)
    with pytest.raises(AdmissionError):
        install(tmp_path / "bad.outrider", state=tmp_path / "state")
    assert snapshot(tmp_path / "state") == {}


def test_a_flipped_bit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "b.outrider"
    make_real_bundle(path)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        install(path, state=tmp_path / "state")
    assert snapshot(tmp_path / "state") == {}


@pytest.mark.slow  # two installs; the store's own rollback is in the loop
def test_rollback_brings_back_bundle_and_choice(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
    first = install(tmp_path / "1.outrider", state=tmp_path)
    install(tmp_path / "2.outrider", state=tmp_path)
    with load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images(), seed=2)
    back = rollback("tiny", state=tmp_path)
    assert isinstance(back, InstallReport)
    assert (back.version, back.digest, back.choice, back.admitted) == (1, first.digest, first.choice, False)
    with load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images(), seed=1)


def test_an_older_version_is_refused(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
    install(tmp_path / "2.outrider", state=tmp_path / "state")
    before = snapshot(tmp_path / "state")
    with pytest.raises(StoreError, match=r"version 1.*2"):
        install(tmp_path / "1.outrider", state=tmp_path / "state")
    assert snapshot(tmp_path / "state") == before


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateDirectoryError, match="file"):
        install(tmp_path / "b.outrider", state=tmp_path / "file" / "state")
