"""The client's benchmark runs against a real endpoint, and its lines say what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import client, shown

pytestmark = pytest.mark.slow


def test_a_peer_that_is_faster_is_a_missed_promise():
    rng = np.random.default_rng(0)
    steady = 1000 + rng.random((10, 20))
    times = {client.OURS: steady, client.TRITON: steady / 2, client.RAW: steady * 2}
    raw, triton = client.promises("binary", times, valid=False)
    assert raw["met"] and raw["measured"] == pytest.approx(0.5, rel=0.01)
    assert not triton["met"] and triton["measured"] == pytest.approx(2.0, rel=0.01)
    assert "too noisy" in raw["note"]


def test_every_client_is_asked_in_every_case(tmp_path, monkeypatch):
    # Every client and every case, few calls: what is looked at is that they are asked, not how fast they are.
    monkeypatch.setattr(client, "BLOCKS", 2)
    monkeypatch.setattr(client, "CALLS_A_BLOCK", 2)
    monkeypatch.setattr(client, "LARGE", 3000)
    monkeypatch.setattr(client, "DEADLINE_MS", 120_000.0)
    monkeypatch.setattr(client, "STOPS_WITHIN_S", 200.0)
    result = client.run(tmp_path)
    assert [name.partition(",")[0] for name in result["cases"]] == ["binary", "JSON", "gRPC", "binary", "gRPC"]
    for name, case in result["cases"].items():
        asked = {client.OURS, client.HANDED, client.TRITON} | (set() if "gRPC" in name else {client.RAW})
        assert set(case["p50_us"]) == asked
    assert len(result["promises"]) == 3 * 2
    page = shown.client(result)
    assert page.count("\n|") == 2 + len(result["cases"])
