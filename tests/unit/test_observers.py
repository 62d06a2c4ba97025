from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_exporters.convert.observers import LEVELS, OBSERVERS, TAIL_SHARE, Histogram, find_range, rounding_error
from support.effort import effort

numbers = st.floats(-1e6, 1e6, width=32)
arrays = st.lists(numbers, min_size=1, max_size=60).map(lambda values: np.array(values, np.float32))
observers = st.sampled_from(OBSERVERS)


def counted(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


@given(arrays, observers)
def test_a_range_holds_zero_and_stays_within_the_values(values, observer):
    low, high = find_range(observer, counted(values))
    assert min(0.0, values.min()) <= low <= 0.0 <= high <= max(0.0, values.max())


@given(arrays, st.integers(0, 59), st.randoms(use_true_random=False), observers)
def test_neither_order_nor_portions_matter(values, at, random, observer):
    mixed = list(values)
    random.shuffle(mixed)
    again = np.array(mixed, np.float32)
    assert find_range(observer, counted(again[:at], again[at:])) == find_range(observer, counted(values))


@given(arrays, observers, st.integers(-20, 20))
def test_a_tensor_of_twice_the_size_has_a_range_of_twice_the_size(values, observer, exponent):
    low, high = find_range(observer, counted(values))
    scaled = find_range(observer, counted(np.ldexp(values.astype(np.float64), exponent)))
    assert scaled == pytest.approx((np.ldexp(low, exponent), np.ldexp(high, exponent)), rel=1e-9, abs=0)


@given(arrays)
def test_every_value_is_counted_within_a_bin_of_where_it_is(values):
    centers, counts = counted(values).counts
    assert counts.sum() == len(values)
    width = max(abs(values).max() / 512, np.ldexp(1.0, -125))
    np.testing.assert_allclose(np.repeat(centers, counts), np.sort(values), rtol=0, atol=width)


@given(arrays)
def test_min_max_takes_all(values):
    values = values.astype(np.float64)
    assert find_range("min-max", counted(values)) == (min(0.0, values.min()), max(0.0, values.max()))


@given(arrays)
@settings(max_examples=effort(60))
def test_mse_is_never_worse_than_min_max(values):
    histogram = counted(values)
    errors = {name: rounding_error(*histogram.counts, find_range(name, histogram)) for name in ("mse", "min-max")}
    assert errors["mse"] <= errors["min-max"]


def test_an_outlier_moves_min_max_and_neither_of_the_others():
    bulk = np.random.default_rng(0).normal(0, 1, 100_000)
    spiked = counted(bulk, np.array([1000.0]))
    assert find_range("min-max", spiked)[1] == 1000.0
    assert find_range("percentile", spiked)[1] == pytest.approx(np.quantile(bulk, 1 - TAIL_SHARE), abs=1.0)
    # One value of 1000 in 100,000 costs the mean square 10; it is worth keeping, and a step of 4 is the price.
    histogram = counted(bulk, np.full(3, 40.0))
    low, high = find_range("mse", histogram)
    assert high < 40.0 and low > -6.0
    assert rounding_error(*histogram.counts, (low, high)) < rounding_error(*histogram.counts, (-6.0, 40.0))


def test_what_fits_is_not_clipped_by_mse():
    steps = np.arange(LEVELS, dtype=np.float64)
    low, high = find_range("mse", counted(np.repeat(steps, 10)))
    assert (low, high) == (0.0, 255.0)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_tensor_without_values_has_no_range(observer):
    assert find_range(observer, counted(np.zeros(0), np.array([np.nan, np.inf]))) == (0.0, 0.0)
    assert find_range(observer, counted(np.zeros(5))) == (0.0, 0.0)


@given(arrays)
def test_without_counting_the_ends_are_the_same(values):
    plain = Histogram(counting=False)
    plain.update(values)
    assert find_range("min-max", plain) == find_range("min-max", counted(values))
