"""The rule by which batching is on or off, and what a curve says between its points."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.curve import ROWS, BatchCurve, BatchPlan, Point, plan_batches, unbatchable
from outrider_runtimes.errors import StoreError
from outrider_runtimes.tensors import Interface, TensorSpec


def curve(*times_ms: float, reason: str = "") -> BatchCurve:
    points = tuple(Point(rows=rows, best_ms=ms, runs=9) for rows, ms in zip(ROWS, times_ms, strict=False))
    return BatchCurve(variant="v", engine="e", threads=1, points=points, reason=reason)


def specs(*given_specs: tuple[str, tuple[int | None, ...], str]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape, axes=axes) for name, shape, axes in given_specs)


def test_what_is_bound_by_its_weights_is_batched_with_the_fewest_rows_that_reach_nine_tenths_of_the_best() -> None:
    plan = plan_batches(curve(6.0, 6.2, 6.5, 7.0, 8.0, 15.6))
    assert isinstance(plan, BatchPlan)
    assert plan.rows == 16  # 2000 rows/s; 32 rows at once give 2051
    assert plan.gain == pytest.approx(12.0)
    assert plan.delay_ms == 5.0  # not the 6 ms of its own call: there is a bound


def test_the_first_row_waits_no_longer_than_its_own_call_takes() -> None:
    plan = plan_batches(curve(0.8, 0.9, 1.0))
    assert isinstance(plan, BatchPlan) and plan.delay_ms == 0.8 and plan.rows == 4


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (curve(35.0, 72.0, 150.0, 310.0, 600.0), "give 1.00 times the rows/s and save 0.000 ms"),  # a ResNet
        (curve(1.0, 1.5, 2.8, 5.6, 11.0), "give 1.45 times"),  # within what a short run is off by
        (curve(0.10, 0.10, 0.11, 0.12, 0.14, 0.2), "save 0.094 ms a row"),  # less than batching costs
        (curve(reason="the file takes 1 row at a time"), "the file takes 1 row at a time"),
        (curve(5.0), "nothing was measured"),
        (None, "install it again"),
    ],
)
def test_where_it_does_not_pay_it_stays_off_and_says_why(measured: BatchCurve | None, why: str) -> None:
    off = plan_batches(measured)
    assert isinstance(off, str) and why in off


@given(st.lists(st.floats(0.01, 1000.0), min_size=2, max_size=6))
def test_a_plan_always_has_a_gain_above_the_noise_and_rows_that_were_measured(times_ms: list[float]) -> None:
    plan = plan_batches(curve(*times_ms))
    if isinstance(plan, BatchPlan):
        assert plan.rows in ROWS[1 : len(times_ms)] and plan.gain >= 1.5 * 0.9
        assert 0.0 < plan.delay_ms <= min(5.0, times_ms[0])


def test_between_points_the_cost_lies_on_the_line_and_beyond_them_it_grows_with_the_rows() -> None:
    found = curve(2.0, 3.0, 4.0)
    assert [found.cost_ms(rows) for rows in (0, 1, 2, 3, 4, 8)] == [2.0, 2.0, 3.0, 3.5, 4.0, 8.0]
    assert curve(reason="x").cost_ms(4) == 0.0


def test_a_curve_survives_json() -> None:
    found = curve(2.0, 3.0, reason="the time was over")
    assert BatchCurve.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    point = {"rows": 1, "best_ms": 1.0, "runs": 3}
    bad_points = ([{"rows": 1}], 3, [point | {"best_ms": 0.0}], [point | {"best_ms": "1"}], [point, point])
    for broken in ({}, *({**found.to_dict(), "points": points} for points in bad_points)):
        with pytest.raises(StoreError, match="malformed"):
            BatchCurve.from_dict(broken)


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (specs(("x", (None, 3), "NC")), specs(("y", (None, 2), "NC")), ""),
        (specs(("x", (None, None, 3), "NTC")), specs(("y", (None, None), "NT")), ""),
        (specs(("x", (None, 3), "NC"), ("k", (), "")), specs(("y", (None, 2), "NC")), "'k' has no free axis N"),
        (specs(("x", (None, 3), "NC")), specs(("y", (2,), "C")), "'y' has no free axis N"),
        (specs(("x", (4, 3), "NC")), specs(("y", (None, 2), "NC")), "'x' has no free axis N"),
        (specs(("x", (None, 3), "NC")), specs(("b", (None, None, 4), "NKC")), "axis 'K' whose size its rows decide"),
    ],
)
def test_only_requests_whose_tensors_all_have_a_free_batch_axis_can_be_put_together(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], why: str
) -> None:
    found = unbatchable(Interface(inputs=inputs, outputs=outputs))
    assert why in found and bool(why) == bool(found)


def test_files_as_bytes_are_not_put_together() -> None:
    image = TensorSpec(name="image", dtype="uint8", shape=(None, None), axes="NT", content_type="image/jpeg")
    interface = Interface(inputs=(image,), outputs=specs(("y", (None, 2), "NC")))
    assert "'image' is image/jpeg" in unbatchable(interface)
