"""The device part of the test suite on every Python that a device may have and this machine has."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from support.boards import INSTALL_AND_ANSWER, run_tests
from support.pythons import device_python, environment_of, find_python
from support.realbundles import expected, images, make_real_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]

HAS = ("onnxruntime", "ai_edge_litert", "flatbuffers", "paho")


@pytest.fixture(params=["3.10", "3.12", "3.13"])  # 3.11 runs this whole suite
def python(request):
    """A Python of that version with what a device has, and its environment."""
    interpreter = find_python(request.param)
    if interpreter is None:
        pytest.skip(f"there is no Python {request.param} on this machine")
    folder = device_python(request.param, interpreter)
    return request.param, folder / "venv/bin/python", environment_of(folder)


def test_the_device_part_of_the_suite_passes(python, tmp_path, record_property):
    version, executable, environment = python
    outcome = run_tests([str(executable)], environment, executable, tmp_path, has=HAS)
    record_property("device tests", f"Python {version}: {outcome.passed} passed, {outcome.skipped} skipped")
    assert outcome.failed == [], outcome.text
    assert outcome.passed >= 1300, outcome.text


def test_a_bundle_is_installed_and_answers(python, tmp_path):
    _, executable, environment = python
    make_real_bundle(tmp_path / "tiny.outrider", formats=("onnx", "tflite"))
    np.save(tmp_path / "image.npy", images(4))
    paths = [tmp_path / name for name in ("tiny.outrider", "state", "image.npy")]
    done = subprocess.run(
        [executable, "-c", "import sys\n" + INSTALL_AND_ANSWER, *paths],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(told["logits"], expected(images(4)), atol=1e-4)
    assert told["measured"] >= 2
