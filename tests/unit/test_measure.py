"""Latencies on a clock of the test's own: what two sessions of one file differ by is noise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.measure import BUDGET_S, FEWEST_ROUNDS, ROUNDS, WARM_UPS, latencies_p50_ms, twin_latencies


class Bench:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, {}

    def __call__(self) -> float:
        return self.now

    def call(self, name, *costs_ms):
        """Takes these times in turn."""

        def run():
            done = self.calls[name] = self.calls.get(name, 0) + 1
            self.now += costs_ms[done % len(costs_ms)] / 1000.0

        return run


def test_a_twin_that_takes_as_long_shows_no_noise():
    bench = Bench()
    found = twin_latencies({"a": (bench.call("a", 2.0), bench.call("b", 2.0))}, seed=0, clock=bench)
    assert found["a"].p50_ms == pytest.approx(2.0)
    assert found["a"].noise == pytest.approx(0.0, abs=1e-6)


def test_what_lies_between_two_sessions_of_one_file_is_its_noise():
    bench = Bench()
    twins = {
        "steady": (bench.call("s1", 4.0), bench.call("s2", 4.0)),
        "moved": (bench.call("m1", 1.0), bench.call("m2", 1.25)),
    }
    found = twin_latencies(twins, seed=3, clock=bench)
    assert found["moved"].noise == pytest.approx(0.25)
    assert 1.0 <= found["moved"].p50_ms <= 1.25
    assert found["steady"].noise == pytest.approx(0.0, abs=1e-6)
    assert set(bench.calls.values()) == {WARM_UPS + ROUNDS}


def test_outliers_of_one_twin_are_no_noise():
    bench = Bench()
    rare = (1.0,) * 20 + (400.0,)
    found = twin_latencies({"a": (bench.call("a", *rare), bench.call("b", 1.0))}, seed=0, clock=bench)
    assert found["a"].noise == pytest.approx(0.0, abs=1e-6)


def test_slow_files_get_fewer_rounds_and_never_too_few():
    bench = Bench()
    latencies_p50_ms({"slow": bench.call("slow", BUDGET_S * 1000.0)}, seed=0, clock=bench)
    assert bench.calls["slow"] == WARM_UPS + FEWEST_ROUNDS


@given(st.floats(0.001, 100.0), st.floats(0.001, 100.0))
def test_the_noise_is_the_share_of_the_faster_twin(first, second):
    bench = Bench()
    found = twin_latencies({"a": (bench.call("a", first), bench.call("b", second))}, seed=0, clock=bench)["a"]
    low, high = sorted((first, second))
    assert found.noise == pytest.approx((high - low) / low, rel=1e-3, abs=1e-6)
    assert low * 0.999 <= found.p50_ms <= high * 1.001
