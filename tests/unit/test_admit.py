"""The first run of a bundle: real models that answer, lie, crash, hang and eat memory, in real children."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.admission import Admission, Measured, choose, remember, remembered
from outrider.admit.admit import admit, default_limits
from outrider.admit.supervise import Limits
from outrider.admit.trial import thread_counts
from outrider.bundle import Bundle, open_bundle
from outrider_runtimes.errors import (
    AdmissionAnswer,
    AdmissionCrash,
    AdmissionError,
    AdmissionHang,
    AdmissionIllegal,
    AdmissionLimit,
    AdmissionNaN,
    AdmissionSlow,
    NoEngine,
    StoreError,
)
from support import tinymodels
from support.realbundles import ONNX, TFLITE, make_real_bundle

pytestmark = pytest.mark.slow

W = tinymodels.weights()


def unpack(bundle: Bundle, folder: Path) -> dict[str, Path]:
    files = {}
    for index, member in enumerate(sorted(bundle.present)):
        files[member] = folder / str(index)
        files[member].write_bytes(bundle.read(member))
    return files


def admitted(folder: Path, *, limits: Limits | None = None, known: Sequence[Admission] = (), **made: Any) -> Admission:
    path = folder / "tiny.outrider"
    make_real_bundle(path, **made)
    with open_bundle(path) as bundle:
        return admit(bundle.manifest, unpack(bundle, folder), builds={}, limits=limits, known=known)


def limits(**changes: Any) -> Limits:
    return dataclasses.replace(default_limits(), **changes)


def test_every_variant_is_tried_on_every_engine_and_the_fastest_chosen(tmp_path: Path) -> None:
    admission = admitted(tmp_path, formats=("onnx", "tflite"))
    pairs = {(row.variant, row.engine) for row in admission.measured}
    assert pairs >= {(ONNX, "onnxruntime"), (TFLITE, "litert")}
    assert all(row.p50_ms > 0 and row.runs >= 3 for row in admission.measured)
    threads = {row.threads for row in admission.measured}
    assert 1 in threads and max(threads) == admission.board["cpus"]
    assert admission.choice == choose(admission.measured)
    assert set(admission.engines) >= {"onnxruntime", "litert"}
    assert admission.peak_rss_bytes > 0


def test_an_admission_goes_through_json_and_back(tmp_path: Path) -> None:
    admission = admitted(tmp_path)
    assert Admission.from_dict(json.loads(json.dumps(admission.to_dict()))) == admission
    with pytest.raises(StoreError, match="malformed"):
        Admission.from_dict({"choice": {}})


def test_nothing_is_run_again_while_engines_and_board_are_the_same(tmp_path: Path) -> None:
    first = admitted(tmp_path)
    marked = dataclasses.replace(first, peak_rss_bytes=1)
    changed = dataclasses.replace(first, engines={"onnxruntime": "0.0.1"}, peak_rss_bytes=1)
    moved = dataclasses.replace(first, board={**first.board, "cpus": 99}, peak_rss_bytes=1)
    assert admitted(tmp_path, known=[changed, moved, marked]) is marked
    again = admitted(tmp_path, known=[changed, moved])
    assert again.peak_rss_bytes > 1
    assert again.engines == first.engines


def test_what_is_kept_is_the_latest_of_each_engine_version_and_board_and_no_more_than_four(tmp_path: Path) -> None:
    first = admitted(tmp_path)
    newer = dataclasses.replace(first, peak_rss_bytes=2)
    assert remembered(json.loads(json.dumps(remember(newer, [first])))) == (newer,)
    kept: tuple[Admission, ...] = ()
    for cpus in range(1, 7):
        kept = remembered(remember(dataclasses.replace(first, board={**first.board, "cpus": cpus}), kept))
    assert [each.board["cpus"] for each in kept] == [6, 5, 4, 3]
    for malformed in ({}, {"admissions": []}, {"admissions": [{}]}, {"admissions": 3}):
        with pytest.raises(StoreError, match="malformed"):
            remembered(malformed)


def test_nothing_fast_enough_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdmissionSlow, match=r"takes .* ms a call; the bound is 1e-09 ms"):
        admitted(tmp_path, limits=limits(latency_ms=1e-9))
    first = admitted(tmp_path, limits=limits(latency_ms=1e9))
    with pytest.raises(AdmissionSlow):
        admitted(tmp_path, limits=limits(latency_ms=1e-9), known=[first])


def test_a_wrong_answer_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(
        AdmissionAnswer, match=r"tiny version 3: variant 'onnx-float32'.*onnxruntime.*differs by"
    ) as info:
        admitted(tmp_path, version=3, golden_shift=0.5)
    assert "untouched" in info.value.hint


def test_one_lying_variant_refuses_the_whole_bundle(tmp_path: Path) -> None:
    other = tinymodels.classifier_tflite(tinymodels.weights(7))
    with pytest.raises(AdmissionAnswer, match=r"variant 'tflite-float32'.*on litert"):
        admitted(tmp_path, formats=("onnx", "tflite"), files={"tflite": other})


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdmissionNaN, match=r"variant 'onnx-float32'.*NaN"):
        admitted(tmp_path, files={"onnx": tinymodels.nan_onnx(W)})


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("garbage", [b"\0" * 4096, bytes(range(256)) * 64])
def test_garbage_is_refused(tmp_path: Path, kind: str, garbage: bytes) -> None:
    with pytest.raises(AdmissionError, match=f"no variant could be loaded here.*{kind}-float32 on"):
        admitted(tmp_path, formats=(kind,), files={kind: garbage})


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    whole = tinymodels.classifier_tflite(W)
    with pytest.raises(AdmissionError, match="tflite-float32"):
        admitted(tmp_path, formats=("tflite",), files={"tflite": whole[: len(whole) // 2]})


def test_what_an_engine_cannot_load_is_left_out_and_shown(tmp_path: Path) -> None:
    admission = admitted(tmp_path, formats=("onnx", "tflite"), files={"onnx": b"not a model"})
    assert {row.variant for row in admission.measured} == {TFLITE}
    assert [(row.variant, row.engine) for row in admission.skipped if row.variant] == [(ONNX, "onnxruntime")]


def test_a_binding_to_a_tensor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    renamed = tinymodels.classifier_onnx(W).replace(b"\x01y", b"\x01z")
    with pytest.raises(AdmissionError, match=r"variant 'onnx-float32'"):
        admitted(tmp_path, files={"onnx": renamed})


def test_a_model_that_hangs_is_killed(tmp_path: Path) -> None:
    for wall_s in (4.0, 60.0):  # the second for a machine on which it is not loaded within four
        with pytest.raises(AdmissionHang, match=f"did not end within {wall_s:g} s") as caught:
            admitted(tmp_path, files={"onnx": tinymodels.endless_onnx(W)}, limits=limits(wall_s=wall_s))
        if "answering its golden" in str(caught.value):
            break
    assert "'onnx-float32', answering its golden" in str(caught.value)


@pytest.mark.slow
def test_a_model_that_burns_its_processor_time_is_killed(tmp_path: Path) -> None:
    with pytest.raises(AdmissionLimit, match="used more than 3 s of CPU"):
        admitted(tmp_path, files={"onnx": tinymodels.endless_onnx(W)}, limits=limits(cpu_s=3.0))


def test_a_model_that_outgrows_its_memory_is_killed(tmp_path: Path) -> None:
    hungry = tinymodels.hungry_onnx(W, elements=2**28)  # 1 GiB twice
    with pytest.raises(AdmissionLimit, match=r"variant 'onnx-float32'.*used more than 400 MiB"):
        admitted(tmp_path, files={"onnx": hungry}, limits=limits(rss_bytes=400 * 2**20))


def test_a_model_that_asks_for_the_impossible_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match=r"variant 'onnx-float32'"):
        admitted(tmp_path, files={"onnx": tinymodels.hungry_onnx(W, elements=2**52)})


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGSEGV,
        pytest.param(signal.SIGILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_child_that_dies_by_a_signal_is_named_with_what_it_was_doing(tmp_path: Path, number: signal.Signals) -> None:
    """An endless model, struck by the signal that a broken kernel would raise in it."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            admitted(tmp_path, files={"onnx": tinymodels.endless_onnx(W)}, limits=limits(wall_s=240.0))
        except AdmissionError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    os.kill(_busy_child(), number)
    thread.join(240.0)
    assert len(caught) == 1
    assert "variant 'onnx-float32', answering its golden inputs on onnxruntime" in str(caught[0])
    assert f"was killed by {number.name}" in str(caught[0])
    assert type(caught[0]) is (AdmissionIllegal if number == signal.SIGILL else AdmissionCrash)
    assert isinstance(caught[0], AdmissionCrash) and caught[0].signal == number


def _busy_child() -> int:
    """The trial of this process once it has used 2.5 s of CPU: imports take 0.3 s, so it is in the model then."""
    ends_at = time.monotonic() + 120.0
    while time.monotonic() < ends_at:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                for pid in (task / "children").read_text().split():
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > 2.5:
                        return int(pid)
        time.sleep(0.02)
    raise AssertionError("no child got busy")


def test_no_engine_for_any_variant_says_why_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation, really found first on the search path by the child."""
    broken = tmp_path / "broken"
    for package in ("ai_edge_litert", "tflite_runtime"):
        (broken / package).mkdir(parents=True)
        (broken / package / "__init__.py").write_text("raise ImportError('built for another numpy')\n")
    monkeypatch.syspath_prepend(str(broken))
    with pytest.raises(NoEngine, match=r"litert: .*built for another numpy.*tflite_runtime: ") as info:
        admitted(tmp_path, formats=("tflite",))
    assert "pip install" in info.value.hint


def test_an_engine_that_dies_on_import_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = tmp_path / "deadly" / "ai_edge_litert"
    deadly.mkdir(parents=True)
    (deadly / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.syspath_prepend(str(deadly.parent))
    admission = admitted(tmp_path, formats=("onnx", "tflite"))
    assert {row.engine for row in admission.measured} == {"onnxruntime"}
    reasons = {row.engine: row.reason for row in admission.skipped}
    assert reasons["litert"] == "importing it was killed by SIGILL: an instruction that this CPU does not have"


def row(p50_ms: float, threads: int = 1, variant: str = "v") -> Measured:
    return Measured(variant=variant, engine="e", threads=threads, p50_ms=p50_ms, runs=9)


def test_a_tie_goes_to_fewer_threads_and_says_so() -> None:
    tie = choose([row(1.0, threads=4), row(1.009, threads=1), row(1.5, threads=1)])
    assert (tie.p50_ms, tie.reason) == (
        1.009,
        "within 1% of the fastest (v on e, 4 threads, 1.000 ms), with fewer threads",
    )
    fastest = choose([row(1.0, threads=4), row(1.03, threads=1)])
    assert (fastest.threads, fastest.reason) == (4, "the fastest of 2 measured")
    assert choose([row(1.01, threads=1, variant="a"), row(1.0, threads=1, variant="b")]).variant == "b"
    assert choose([row(1.0)]).reason == "nothing else runs here"


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 64)), min_size=1, max_size=20))
def test_the_choice_is_within_one_percent_of_the_best_and_no_other_such_has_fewer_threads(
    cells: list[tuple[float, int]],
) -> None:
    rows = [row(p50_ms, threads) for p50_ms, threads in cells]
    chosen = choose(rows)
    best = min(each.p50_ms for each in rows)
    assert chosen.p50_ms <= best * 1.01
    assert all(each.threads >= chosen.threads for each in rows if each.p50_ms <= best * 1.01)


@given(st.integers(1, 300))
def test_thread_counts_go_from_all_down_to_one(usable: int) -> None:
    counts = thread_counts(usable)
    assert counts[0] == usable and counts[-1] == 1
    assert counts == sorted(set(counts), reverse=True)
