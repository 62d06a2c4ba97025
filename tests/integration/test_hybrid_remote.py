"""Hybrid over a Model on a real engine and a Remote whose endpoint is not there, is silent, or is another Model."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider_runtimes.errors import DeadlineExceeded
from outrider_runtimes.remote import Remote
from support.hybrids import onnx_model
from support.ports import free_port
from support.realbundles import expected, images

FAR_MS = 120_000.0
ALL_UNCERTAIN = Policy(FAR_MS, min_margin=1.0, open_s=0.2, open_max_s=0.4)
X = images(1)


@pytest.fixture
def edge(tmp_path):
    with onnx_model(tmp_path, seed=0) as model:
        yield model


def test_two_models_compose_as_edge_and_cloud(edge, tmp_path):
    with onnx_model(tmp_path, seed=1) as large:
        hybrid = Hybrid(edge, large, Policy(FAR_MS, min_margin=1.0))
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
        hybrid = Hybrid(edge, remote, replace(ALL_UNCERTAIN, open_s=3600.0, open_max_s=3600.0))
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
            hybrid = Hybrid(edge, remote, replace(ALL_UNCERTAIN, deadline_ms=1000.0))

            def asked(_: int) -> tuple[str, str]:
                try:
                    prediction = hybrid.infer({"image": X})
                except DeadlineExceeded:  # the machine has stalled for so long that the edge was late
                    return "stalled", ""
                return prediction.source, prediction.reason

            with ThreadPoolExecutor(8) as pool:
                told = [answer for answer in pool.map(asked, range(40), timeout=FAR_MS / 1e3) if answer[0] != "stalled"]
            while not told:
                told = [answer for answer in map(asked, range(40)) if answer[0] != "stalled"]
    assert {source for source, _ in told} == {"edge_degraded"}
    assert {reason for _, reason in told} <= {"cloud_late", "circuit_open", "no_time_left"}
