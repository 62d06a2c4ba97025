"""An installed bundle on another board or engine than it was measured on: measured again, once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.admit.admission import same_board
from outrider.bundle import Trust
from outrider.installer import install
from outrider.model import load
from outrider.store import Store
from outrider_runtimes.board import this_board
from outrider_runtimes.errors import (
    AdmissionError,
)
from support.realbundles import ONNX, TFLITE, close_to, images, make_real_bundle, rewrite_admission


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda admission: admission["engines"].update(onnxruntime="0.0.1"), "onnxruntime's version is another"),
        (lambda admission: admission["board"].update(cpus=99), "the board is another"),
    ],
)
def test_another_engine_version_or_board_is_measured_at_the_next_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    first = install(tmp_path / "b.outrider", state=tmp_path)
    rewrite_admission(tmp_path, lambda admission: (change(admission), admission.update(peak_rss_bytes=1)))
    with caplog.at_level(logging.WARNING), load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images())
    assert says in caplog.text
    kept = json.loads((tmp_path / "names/tiny.json").read_text())["current"]["choice"]["admissions"]
    assert [each["peak_rss_bytes"] > 1 for each in kept] == [True, False]  # the other board's is kept too
    assert (kept[0]["engines"], kept[0]["board"]) == (first.engines, first.board)
    caplog.clear()
    load("tiny", state=tmp_path).close()
    assert "measuring again" not in caplog.text
    assert not install(tmp_path / "b.outrider", state=tmp_path).admitted


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.96, True), (1.04, True), (0.9, False), (1.1, False)])
def test_a_little_memory_more_or_less_is_the_same_board_and_nothing_else_is(share: float, same: bool) -> None:
    board = this_board().to_dict()
    other = {**board, "memory_bytes": int(board["memory_bytes"] * share)}
    assert same_board(board, other) is same_board(other, board) is same
    assert not same_board(board, {**other, "cpus": 99})
    assert not same_board(board, {**other, "python": "3.9.0"})


@pytest.mark.slow
def test_a_ladder_on_a_changed_board_measures_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    install(tmp_path / "b.outrider", state=tmp_path)
    rewrite_admission(tmp_path, lambda admission: admission["board"].update(cpus=99))
    with caplog.at_level(logging.WARNING):
        load("tiny", state=tmp_path, ladder=[ONNX, TFLITE], latency_ms=1e6).close()
    assert caplog.text.count("measuring again") == 1


@pytest.mark.slow
def test_a_bundle_that_a_new_engine_breaks_says_with_what_it_passed(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", golden_shift=0.5)
    make_real_bundle(tmp_path / "good.outrider")
    install(tmp_path / "good.outrider", state=tmp_path)
    store = Store(tmp_path)
    with store.add(tmp_path / "b.outrider", Trust()) as staged:  # as if it had passed with another engine
        store.activate(staged, store.installed("tiny").choice)
    rewrite_admission(tmp_path, lambda admission: admission["engines"].update(onnxruntime="0.0.1"))
    with pytest.raises(AdmissionError, match="differs by") as info:
        load("tiny", state=tmp_path)
    assert "onnxruntime 0.0.1" in info.value.hint
