"""The device part of the test suite, run by a Raspberry Pi 4's Python: 64-bit ARM, numpy 2, ONNX Runtime, LiteRT."""

from __future__ import annotations

import json

import numpy as np
import pytest

from support.boards import INSTALL_AND_ANSWER, run_device_tests, run_on_board
from support.realbundles import expected, images, make_real_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]

HAS = ("onnxruntime", "ai_edge_litert", "flatbuffers", "paho")


def test_the_device_part_of_the_suite_passes_on_64_bit_arm(tmp_path, record_property):
    outcome = run_device_tests("pi4", tmp_path, has=HAS)
    record_property("device tests", f"pi4: {outcome.passed} passed, {outcome.skipped} skipped")
    assert outcome.failed == [], outcome.text
    assert outcome.passed >= 1300, outcome.text


def test_a_bundle_is_installed_and_answers_there(tmp_path):
    make_real_bundle(tmp_path / "tiny.outrider", formats=("onnx", "tflite"))
    np.save(tmp_path / "image.npy", images(4))
    paths = [tmp_path / name for name in ("tiny.outrider", "state", "image.npy")]
    told = json.loads(run_on_board("pi4", tmp_path, INSTALL_AND_ANSWER, *paths).splitlines()[-1])
    assert told["engine"] in {"onnxruntime", "litert"}
    np.testing.assert_allclose(told["logits"], expected(images(4)), atol=1e-4)
    assert told["measured"] >= 2
