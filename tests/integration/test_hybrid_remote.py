"""Hybrid over a Model on a real engine and a Remote whose endpoint is not there, is silent, or is another Model."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider_runtimes.remote import Remote
from support.hybrids import onnx_model
from support.ports import free_port
from support.realbundles import expected, images

DEADLINE_MS = 1000.0
LATE_MS = 5000.0  # what a loaded test machine may add
ALL_UNCERTAIN = Policy(DEADLINE_MS, min_margin=1.0, open_s=0.2, open_max_s=0.4)
X = images(1)


@pytest.fixture
def edge(tmp_path):
    with onnx_model(tmp_path, seed=0) as model:
        yield model


def test_two_models_compose_as_edge_and_cloud(edge, tmp_path):
    with onnx_model(tmp_path, seed=1) as large:
        hybrid = Hybrid(edge, large, Policy(60_000.0, min_margin=1.0))
        prediction = hybrid.infer({"image": X})
    assert (prediction.source, prediction.reason) == ("cloud", "uncertain")
    assert (prediction.bundle, prediction.engine, prediction.variant) == (
        large.bundle.digest,
        "onnxruntime",
        "onnx-float32",
    )
    np.testing.assert_allclose(prediction.outputs["logits"], expected(X, seed=1), atol=1e-4)


def test_an_endpoint_that_is_not_there_leaves_the_edge(edge):
    with Remote(f"http://127.0.0.1:{free_port()}", model="tiny") as remote:
        hybrid = Hybrid(edge, remote, ALL_UNCERTAIN)
        predictions = [hybrid.infer({"image": X}) for _ in range(30)]
    assert {p.source for p in predictions} == {"edge_degraded"}
    assert {p.reason for p in predictions} == {"cloud_unavailable", "circuit_open"}
    assert {p.bundle for p in predictions} == {edge.bundle.digest}
    np.testing.assert_allclose(predictions[-1].outputs["logits"], expected(X, seed=0), atol=1e-4)


def test_an_endpoint_that_accepts_and_says_nothing_makes_nobody_late(edge):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        with Remote(f"http://127.0.0.1:{silent.getsockname()[1]}", model="tiny") as remote:
            begun_s = time.monotonic()
            hybrid = Hybrid(edge, remote, ALL_UNCERTAIN)
            assert time.monotonic() - begun_s < 1.0 + LATE_MS / 1000.0
            with ThreadPoolExecutor(8) as pool:
                predictions = list(pool.map(lambda _: hybrid.infer({"image": X}), range(40)))
    assert {p.source for p in predictions} == {"edge_degraded"}
    assert {p.reason for p in predictions} <= {"cloud_late", "circuit_open", "no_time_left"}
    assert max(p.timing_ms.total for p in predictions) < DEADLINE_MS + LATE_MS
