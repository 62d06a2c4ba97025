"""The overload benchmark with a small network and a second of load: real processes, no figure is judged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks import overload
from benchmarks.handmade import dense, write_handmade

from outrider_exporters.demo.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 1.0
NETWORK = dense("small", 64, 2)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(overload, "SECONDS", SECONDS)
    monkeypatch.setattr(overload, "DEADLINE_S", 60.0)  # what is late is not judged
    return write_handmade(NETWORK, tmp_path, formats=("onnx",))


def test_what_an_endpoint_is_offered_ends_in_one_way_and_it_lives(bundle: Path, tmp_path: Path) -> None:
    processor = max(os.sched_getaffinity(0))
    found = overload.load_endpoint(bundle, {"x": NETWORK.input()}, times=2.0, folder=tmp_path, processor=processor)
    assert found["lives"] is True
    assert found["good"] > 0
    assert found["good"] + found["refused"] + found["late"] + found["failed"] == found["asked"]
    assert found["asked"] == found["offered_per_s"] * SECONDS
    assert found["goodput"] == pytest.approx(found["good"] / SECONDS / found["alone_per_s"])


def test_a_board_is_loaded_alone_and_with_the_cloud(bundle: Path, tmp_path: Path) -> None:
    processor = max(os.sched_getaffinity(0))
    with overload.served(bundle, tmp_path, processor) as (_, url):
        arguments = [str(bundle), str(tmp_path / "board"), url, NETWORK.name, "0.2"]
        with Process("board", ["-m", "benchmarks.board", *arguments], folder=tmp_path) as board:
            board.wait(300.0)
        told = board.last_json()
    assert told["offered_per_s"] == pytest.approx(3.0 * told["edge_per_s"])
    for who in ("alone", "together"):
        assert len(told[who]) == 2
        for each in told[who]:
            assert each["good"] + each["refused"] + each["late"] + each["failed"] == each["asked"] > 0
    assert set(told["sources"]) & {"edge, edge", "cloud, queue"}
