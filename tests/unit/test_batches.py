"""The batch curve as an install measures it: on a clock that only the calls move, over sessions of numpy, and once for
real in the child that admits a bundle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outrider
from outrider.admit.admission import Admission, Choice, batches_of, remembered
from outrider.admit.batches import INFLUENCED, golden_rows, measure_batches, time_rows
from outrider.admit.curve import ROWS, BatchCurve
from outrider.bundle import Manifest, load_golden, open_bundle
from outrider.cli.text import batches_text
from outrider.store import Store
from outrider_runtimes.errors import InferenceError, StoreError
from support.bundles import make_bundle
from support.realbundles import make_real_bundle

WEIGHTS = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)


class Calls:
    """Each call takes ``fixed_s`` and ``row_s`` for each row, on a clock of its own."""

    def __init__(self, *, fixed_s: float, row_s: float) -> None:
        self.now_s = 0.0
        self.fixed_s, self.row_s = fixed_s, row_s
        self.rows: list[int] = []

    def __call__(self, rows: int) -> None:
        self.rows.append(rows)
        self.now_s += self.fixed_s + self.row_s * rows

    def time(self, **options: Any) -> tuple[dict[int, list[float]], str]:
        return time_rows(self, room=options.pop("room", lambda: True), clock=lambda: self.now_s, **options)


def test_every_number_of_rows_is_timed_in_three_rounds() -> None:
    calls = Calls(fixed_s=0.004, row_s=0.0001)
    taken_s, why = calls.time()
    assert tuple(taken_s) == ROWS and why == ""
    for rows, each in taken_s.items():
        assert len(each) >= 3 and each == pytest.approx([0.004 + 0.0001 * rows] * len(each))
    assert calls.now_s < 0.2


def test_a_slow_model_is_timed_as_far_as_two_seconds_go() -> None:
    calls = Calls(fixed_s=0.0, row_s=0.04)
    taken_s, why = calls.time()
    assert tuple(taken_s) == (1, 2, 4) and why == "8 rows at once take more time than there was"
    assert calls.now_s <= 2.0
    assert min(len(each) for each in taken_s.values()) == 3


def test_one_row_is_always_timed() -> None:
    taken_s, why = Calls(fixed_s=60.0, row_s=0.0).time()
    assert tuple(taken_s) == (1,) and why == "2 rows at once take more time than there was"


def test_it_stops_before_it_takes_too_much_memory() -> None:
    calls = Calls(fixed_s=0.001, row_s=0.0)
    taken_s, why = calls.time(room=lambda: max(calls.rows, default=0) < 4)
    assert tuple(taken_s) == (1, 2, 4) and why == "8 rows at once take more memory than there was"


class NumpySession:
    """``image [N, 2, 2]`` to ``logits [N, 3]``."""

    input_names, output_names = ("x",), ("y",)

    def __init__(self, share: Any = lambda x: np.float32(1.0)) -> None:
        self.share = share
        self.calls: list[int] = []

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        (x,) = inputs
        self.calls.append(len(x))
        return [(x.reshape(len(x), 4) @ WEIGHTS) / self.share(x)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Any]:
    with open_bundle(make_bundle(tmp_path_factory.mktemp("bundles"))) as bundle:
        return bundle.manifest, load_golden(bundle.read, bundle.manifest)


def measured(opened: tuple[Manifest, Any], session: NumpySession) -> BatchCurve:
    manifest, golden = opened
    variant = manifest.variants[0]
    ticks = itertools.count()
    options: dict[str, Any] = {"engine": "numpy", "threads": 2, "one_s": [1e-9], "room": lambda: True}
    return measure_batches(manifest, golden, variant, session, clock=lambda: next(ticks) * 1e-3, **options)


def test_rows_that_do_not_look_at_each_other_are_timed(opened: tuple[Manifest, Any]) -> None:
    session = NumpySession()
    found = measured(opened, session)
    assert [point.rows for point in found.points] == list(ROWS) and found.reason == ""
    assert (found.variant, found.engine, found.threads) == ("onnx-float32", "numpy", 2)
    assert found.points[0].best_ms == pytest.approx(1e-6)  # what was measured before counts
    assert set(session.calls) == {*ROWS} and not hasattr(session, "closed")


def test_rows_whose_scale_is_that_of_the_whole_call_are_not_put_together(opened: tuple[Manifest, Any]) -> None:
    found = measured(opened, NumpySession(share=lambda x: np.abs(x).max()))
    assert found.points == () and found.reason == INFLUENCED


def test_a_session_that_fails_on_several_rows_says_so_and_the_install_goes_on(opened: tuple[Manifest, Any]) -> None:
    def refuse(x: np.ndarray) -> np.float32:
        if len(x) > 1:
            raise InferenceError("one row at a time, please")
        return np.float32(1.0)

    found = measured(opened, NumpySession(share=refuse))
    assert found.points == () and "one row at a time, please" in found.reason


def test_golden_rows_begin_again_where_there_are_not_enough() -> None:
    rows = golden_rows({"x": np.arange(3)}, 8)["x"]
    assert rows.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_install_keeps_the_curve_with_the_choice_and_a_load_has_it(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    report = outrider.install(tmp_path / "b.outrider", state=tmp_path / "state")
    assert report.batches is not None
    curve = BatchCurve.from_dict(report.batches)
    assert (curve.variant, curve.engine, curve.threads) == (
        report.choice.variant, report.choice.engine, report.choice.threads,
    )  # fmt: skip
    assert tuple(point.rows for point in curve.points) == ROWS[: len(curve.points)]
    assert curve.points and (len(curve.points) == len(ROWS) or curve.reason)
    text = batches_text(report.batches)
    assert text.startswith(("off when served: ", "up to ")) and "(1: " in text
    kept = remembered(Store(tmp_path / "state").installed(report.name).choice)[0]
    assert kept.batches == report.batches
    assert batches_of(kept, kept.choice) == report.batches
    other = Choice(variant="other", engine="e", threads=1, p50_ms=1.0)
    assert batches_of(kept, other) is None
    with outrider.load(report.name, state=tmp_path / "state") as model:
        assert model.batches == report.batches


def test_what_an_earlier_version_kept_has_no_curve_and_a_broken_one_is_named() -> None:
    choice = {"variant": "v", "engine": "e", "threads": 1, "p50_ms": 1.0, "reason": ""}
    row = {"variant": "v", "engine": "e", "threads": 1, "p50_ms": 1.0, "runs": 9}
    kept = {"choice": choice, "measured": [row], "skipped": [], "engines": {}, "board": {}, "peak_rss_bytes": 1}
    admission = Admission.from_dict(kept)
    assert admission.batches is None and batches_of(admission, admission.choice) is None
    assert batches_text(None) == "off when served: batches were not measured when it was installed; install it again"
    with pytest.raises(StoreError, match="malformed"):
        Admission.from_dict({**kept, "batches": 3})
