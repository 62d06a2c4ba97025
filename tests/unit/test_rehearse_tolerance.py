"""What a rehearsal measured becomes the tolerance of a new bundle, or nothing is written."""

from __future__ import annotations

import dataclasses
import json

import pytest

from outrider.bundle import Trust, open_bundle, public_bytes, set_tolerance, thin_bundle, verify_bundle
from outrider_exporters.rehearse.report import Pair, Rehearsal, TargetReport
from outrider_exporters.rehearse.tolerance import write_tolerance
from outrider_runtimes.errors import BundleError, FormatError, RehearsalError, TrustError
from support.bundles import make_bundle
from support.keys import private_key

ONNX = Pair(variant="onnx-float32", engine="onnxruntime", verdict="right", max_error={"logits": 2e-6})
BEYOND = Pair(
    variant="tflite-int8",
    engine="litert",
    verdict="wrong",
    detail="output 'logits' differs by 0.5",
    max_error={"logits": 0.5},
    only_tolerance=True,
)
ABSENT = Pair(variant="tflite-int8", engine="tflite_runtime", verdict="absent", detail="not installed")


def rehearsal(path, *pairs):
    with open_bundle(path) as bundle:
        digest = bundle.manifest.digest
    target = TargetReport(target="pi4", cpu="cortex-a72", emulated=True, board={}, pairs=pairs)
    return Rehearsal(path=str(path), name="tiny", version=1, digest=digest, targets=(target,), spread={})


def tolerances(path):
    return verify_bundle(path).manifest.golden.tolerance


def test_what_was_measured_is_the_new_tolerance_and_all_else_stays(tmp_path):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    written = write_tolerance(rehearsal(source, ONNX, BEYOND, ABSENT), output)
    assert tolerances(output) == {"onnx-float32": {"logits": 2e-6}, "tflite-int8": {"logits": 0.5}}
    assert written["tolerance"] == tolerances(output)
    old, new = verify_bundle(source).manifest, verify_bundle(output).manifest
    assert new.digest == written["digest"] != old.digest
    assert (new.members, new.variants, new.interface) == (old.members, old.variants, old.interface)
    assert dataclasses.replace(new.golden, tolerance=old.golden.tolerance) == old.golden
    data = json.loads(old.raw)
    data["golden"]["tolerance"] = written["tolerance"]
    assert json.loads(new.raw) == data


def test_a_variant_that_answered_nowhere_keeps_its_tolerance(tmp_path):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    write_tolerance(rehearsal(source, ONNX, ABSENT), output)
    assert tolerances(output)["tflite-int8"] == tolerances(source)["tflite-int8"]


def test_old_signatures_are_not_copied_and_a_key_signs_anew(tmp_path):
    source, output = make_bundle(tmp_path, keys=[private_key(1)]), tmp_path / "new.outrider"
    written = write_tolerance(rehearsal(source, ONNX), output, keys=[private_key(2)])
    assert (written["signatures"], written["dropped_signatures"]) == (1, 1)
    old, new = (Trust(keys=frozenset([public_bytes(private_key(number))])) for number in (1, 2))
    assert verify_bundle(source, old).verified and verify_bundle(output, new).verified
    with pytest.raises(TrustError):
        verify_bundle(output, old)


def test_a_bundle_may_be_written_over_itself(tmp_path):
    source = make_bundle(tmp_path)
    write_tolerance(rehearsal(source, ONNX), source)
    assert tolerances(source)["onnx-float32"] == {"logits": 2e-6}


@pytest.mark.parametrize("verdict", ["wrong", "failed", "illegal", "crashed", "hung", "memory"])
def test_no_tolerance_mends_anything_else(tmp_path, verdict):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    bad = dataclasses.replace(BEYOND, verdict=verdict, only_tolerance=False)
    with pytest.raises(RehearsalError, match="no tolerance mends pi4: tflite-int8 on litert"):
        write_tolerance(rehearsal(source, ONNX, bad), output)
    assert not output.exists()


def test_nothing_measured_nothing_written(tmp_path):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    with pytest.raises(RehearsalError, match="nothing was measured"):
        write_tolerance(rehearsal(source, ABSENT), output)
    assert not output.exists()


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(tmp_path):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    found = rehearsal(source, ONNX)
    make_bundle(tmp_path, seed=5, filename=source.name)
    with pytest.raises(RehearsalError, match="replaced meanwhile"):
        write_tolerance(found, output)
    assert not output.exists()


def test_a_thin_bundle_stays_thin(tmp_path):
    source, thin, output = make_bundle(tmp_path), tmp_path / "thin.outrider", tmp_path / "new.outrider"
    thin_bundle(source, thin, variants=["onnx-float32"])
    set_tolerance(thin, output, tolerance={"onnx-float32": {"logits": 0.25}})
    with open_bundle(thin) as before, open_bundle(output) as after:
        assert after.present == before.present
        assert after.manifest.golden.tolerance["onnx-float32"] == {"logits": 0.25}


@pytest.mark.parametrize(
    ("tolerance", "error"),
    [
        ({"nobody": {"logits": 0.1}}, BundleError),
        ({"onnx-float32": {"nothing": 0.1}}, FormatError),
        ({"onnx-float32": {"logits": -1.0}}, FormatError),
        ({"onnx-float32": {"logits": float("nan")}}, FormatError),
        ({"onnx-float32": {"logits": float("inf")}}, FormatError),
    ],
)
def test_a_tolerance_that_cannot_be(tmp_path, tolerance, error):
    source, output = make_bundle(tmp_path), tmp_path / "new.outrider"
    with pytest.raises(error):
        set_tolerance(source, output, tolerance=tolerance)
    assert not output.exists()
