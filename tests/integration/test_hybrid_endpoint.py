"""Hybrid before the real endpoint in its own process, which is killed in mid-stream and comes back."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider.prediction import Prediction
from outrider_runtimes.errors import InterfaceMismatch
from outrider_runtimes.remote import Remote
from support.hybrids import EndpointProcess, onnx_model
from support.realbundles import INTERFACE, expected, images, make_real_bundle

FAR_MS = 120_000.0  # nobody is answered for want of time; how late a call may be is the benchmark's to measure
ALL_UNCERTAIN = Policy(FAR_MS, min_margin=1.0, open_s=0.1, open_max_s=0.4)
X = images(1)
AWAY = {"cloud_unavailable", "cloud_late", "cloud_refused", "cloud_busy", "circuit_open", "no_time_left"}


class Stream:
    """Callers in threads, each asking again and again; what they got, in order of arrival."""

    def __init__(self, hybrid: Hybrid, callers: int = 4) -> None:
        self.got: list[Prediction] = []
        self.raised: list[BaseException] = []
        self._hybrid = hybrid
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(callers)]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, source: str, count: int, timeout_s: float = 200.0) -> None:
        """Until so many more of that source have come."""
        wanted = count + self._count(source)
        end_s = time.monotonic() + timeout_s
        while self._count(source) < wanted:
            assert time.monotonic() < end_s, f"{Counter((p.source, p.reason) for p in self.got)}, {self.raised[:3]}"
            time.sleep(0.01)

    def _count(self, source: str) -> int:
        return sum(p.source == source for p in self.got)

    def _ask(self) -> None:
        while not self._end.wait(0.005):  # the stream's pace
            try:
                self.got.append(self._hybrid.infer({"image": X}))
            except BaseException as error:
                self.raised.append(error)


@pytest.fixture
def endpoint(tmp_path):
    bundle = tmp_path / "large.outrider"
    digest = make_real_bundle(bundle, name="large", seed=1)
    endpoint = EndpointProcess(bundle, model="large", state=tmp_path / "state")
    endpoint.digest = digest
    endpoint.start()
    yield endpoint
    endpoint.stop()


def test_the_endpoint_answers_what_is_uncertain(endpoint, tmp_path):
    with onnx_model(tmp_path, seed=0) as edge, Remote(endpoint.url, model="large") as remote:
        prediction = Hybrid(edge, remote, Policy(FAR_MS, min_margin=1.0)).infer({"image": X})
    assert (prediction.source, prediction.reason) == ("cloud", "uncertain")
    assert (prediction.bundle, prediction.engine, prediction.verified) == (endpoint.digest, "remote", False)
    np.testing.assert_allclose(prediction.outputs["logits"], expected(X, seed=1), atol=1e-4)
    timing = prediction.timing_ms
    assert 0.0 < timing.network <= timing.total


def test_a_killed_endpoint_makes_nobody_late_and_comes_back(endpoint, tmp_path):
    with onnx_model(tmp_path, seed=0) as edge, Remote(endpoint.url, model="large") as remote:
        stream = Stream(Hybrid(edge, remote, ALL_UNCERTAIN))
        with stream:
            stream.wait_for("cloud", 40)
            endpoint.kill()
            killed = len(stream.got)
            stream.wait_for("edge_degraded", 100)
            down = stream.got[killed:]
            endpoint.start()
            stream.wait_for("cloud", 40)
    assert stream.raised == []
    # An answer that was on its way when the process died may still arrive.
    assert sum(p.source == "cloud" for p in down) <= 4
    assert {p.reason for p in stream.got if p.source == "edge_degraded"} <= AWAY
    degraded = next(p for p in down if p.source == "edge_degraded")
    np.testing.assert_allclose(degraded.outputs["logits"], expected(X, seed=0), atol=1e-4)
    np.testing.assert_allclose(stream.got[-1].outputs["logits"], expected(X, seed=1), atol=1e-4)


def test_another_interface_is_refused_over_the_wire_and_later_never_asked(endpoint, tmp_path):
    other = dataclasses.replace(INTERFACE, labels=tuple("abcdefghij"))
    with onnx_model(tmp_path, interface=other) as edge, Remote(endpoint.url, model="large") as remote:
        with pytest.raises(InterfaceMismatch):
            Hybrid(edge, remote, ALL_UNCERTAIN)
        endpoint.kill()
        with Remote(endpoint.url, model="large") as later:
            hybrid = Hybrid(edge, later, ALL_UNCERTAIN)
            endpoint.start()
            predictions = [hybrid.infer({"image": X}) for _ in range(3)]
    assert {(p.source, p.reason) for p in predictions} == {("edge_degraded", "interface_mismatch")}
