"""What a Hybrid refuses: bad input, a policy or a deadline that does not fit, a cloud of another interface."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from outrider.policy import Policy
from outrider_runtimes.errors import (
    ConfigError,
    InputError,
    InterfaceMismatch,
    NotFiniteError,
    UnknownTensor,
)
from outrider_runtimes.tensors import Interface, TensorSpec
from support.runners import CLASSES, INTERFACE, OTHER_INTERFACE, ConnectingRunner, NumpyRunner, told
from support.sides import GENEROUS_MS, SURE, UNSURE, Hybrid
from support.straight import StraightRunner

LATE_S = 60.0  # what a loaded test machine may add; the 5 ms of the promise are the benchmark's to measure
POLICY = Policy(GENEROUS_MS, min_margin=0.5)


def test_a_deadline_may_be_never(edge, cloud):
    hybrid = Hybrid(edge, cloud, Policy(None, min_margin=0.5))
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")


@pytest.mark.parametrize("deadline_ms", [0.0, -1.0, math.nan])
def test_a_deadline_that_is_none_is_refused(edge, cloud, deadline_ms):
    with pytest.raises(ConfigError, match="deadline_ms"):
        Hybrid(edge, cloud, POLICY).infer({"x": SURE}, deadline_ms=deadline_ms)


def bad_inputs():
    yield {}, UnknownTensor
    yield {"y": SURE}, UnknownTensor
    yield {"x": SURE, "y": SURE}, UnknownTensor
    yield {"x": SURE.astype(np.float64)}, InputError
    yield {"x": SURE[0]}, InputError
    yield {"x": SURE * np.float32("nan")}, NotFiniteError
    yield [[1.0, 2.0, 3.0, 4.0]], InputError


@pytest.mark.parametrize(("inputs", "error"), list(bad_inputs()))
def test_bad_input_reaches_neither_side_and_the_next_call_is_the_same_bits(edge, cloud, inputs, error):
    hybrid = Hybrid(edge, cloud, POLICY)
    before = [hybrid.infer({"x": x}).outputs["logits"].tobytes() for x in (SURE, UNSURE)]
    submitted = edge.submitted, cloud.submitted
    with pytest.raises(error):
        hybrid.infer(inputs)
    assert (edge.submitted, cloud.submitted) == submitted
    assert [hybrid.infer({"x": x}).outputs["logits"].tobytes() for x in (SURE, UNSURE)] == before


def two_headed() -> Interface:
    outputs = (
        TensorSpec(name="logits", dtype="float32", shape=(None, CLASSES), axes="NC"),
        TensorSpec(name="label", dtype="int64", shape=(None,), axes="N"),
    )
    return Interface(inputs=INTERFACE.inputs, outputs=outputs)


@pytest.mark.parametrize("finite", ["reject", "pass"])
def test_what_is_not_finite_is_refused_whatever_the_edge_lets_pass(cloud, finite):
    edge = StraightRunner()
    edge.finite = finite
    with pytest.raises(NotFiniteError):
        Hybrid(edge, cloud, POLICY).infer({"x": np.full((1, 4), np.inf, np.float32)})
    assert edge.saw == [] and cloud.submitted == 0


@pytest.mark.parametrize("asked", ["edge", "cloud"])
def test_infinities_are_clipped_for_both_sides_where_the_edge_clips(asked):
    sides = {"edge": StraightRunner(), "cloud": StraightRunner()}
    edge = sides["edge"]
    edge.finite, edge.cloud_only = "clip", asked == "cloud"
    hybrid = Hybrid(edge, sides["cloud"], Policy(GENEROUS_MS))
    edge.expected_ms = 1.0
    largest = np.finfo(np.float32).max
    assert hybrid.infer({"x": np.array([[np.inf, 0.0, -np.inf, 1.0]], np.float32)}).source == asked
    np.testing.assert_array_equal(sides[asked].saw[0]["x"], [[largest, 0.0, -largest, 1.0]])
    with pytest.raises(NotFiniteError):
        hybrid.infer({"x": np.full((1, 4), np.nan, np.float32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "scores"}, "scores"),
        ({"min_margin": 0.5}, "not given"),
        ({"min_margin": 0.5, "output": "label"}, "label.*int64"),
    ],
)
def test_a_policy_that_does_not_fit_the_interface_is_refused(changes, message):
    edge, cloud = NumpyRunner(interface=two_headed()), NumpyRunner(interface=two_headed())
    try:
        with pytest.raises(ConfigError, match=message):
            Hybrid(edge, cloud, Policy(80.0, **changes))
    finally:
        edge.close()
        cloud.close()


@pytest.mark.parametrize("sides", [(None, "b"), ("a", None), ("a", Policy(80.0))])
def test_what_is_no_runner_is_refused(edge, cloud, sides):
    runners = [{"a": edge, "b": cloud}.get(side, side) if isinstance(side, str) else side for side in sides]
    with pytest.raises(ConfigError, match="answers nothing"):
        Hybrid(*runners, POLICY)


@pytest.mark.parametrize("option", ["meter", "rng", "root"])
@pytest.mark.parametrize("given", [5, "x", b"x"])
def test_an_option_of_another_kind_is_refused_at_once(option, given):
    with pytest.raises(ConfigError, match=f"{option} is {given!r}, expected"):
        Hybrid(StraightRunner(), StraightRunner(), POLICY, **{option: given})


def test_another_interface_is_refused(edge):
    other = NumpyRunner(interface=OTHER_INTERFACE)
    with pytest.raises(InterfaceMismatch, match=OTHER_INTERFACE.digest[:12]):
        Hybrid(edge, other, POLICY)
    other.close()


def test_another_interface_of_a_remote_is_refused(edge):
    other = ConnectingRunner(interface=OTHER_INTERFACE)
    with pytest.raises(InterfaceMismatch):
        Hybrid(edge, other, POLICY)
    other.close()


def test_a_cloud_that_is_down_at_first_is_compared_before_it_is_asked(edge):
    late = ConnectingRunner(down=True)
    hybrid = Hybrid(edge, late, POLICY)
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "cloud_unavailable")
    assert late.submitted == 0
    late.down = False
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert told(hybrid.infer({"x": UNSURE})) == ("cloud", "uncertain")
    assert late.connects == 3
    late.close()


def test_a_cloud_found_different_later_is_never_asked_and_it_is_logged_once(edge, caplog):
    late = ConnectingRunner(down=True, interface=OTHER_INTERFACE)
    hybrid = Hybrid(edge, late, POLICY)
    late.down = False
    for _ in range(5):
        assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "interface_mismatch")
    assert late.submitted == 0
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    late.close()


def test_a_cloud_that_changes_its_interface_under_way_is_never_asked_again(edge):
    cloud = ConnectingRunner()
    hybrid = Hybrid(edge, cloud, POLICY)
    assert hybrid.infer({"x": UNSURE}).source == "cloud"
    cloud.interface_digest = OTHER_INTERFACE.digest
    assert told(hybrid.infer({"x": UNSURE})) == ("edge_degraded", "interface_mismatch")
    assert cloud.submitted == 1
    cloud.close()


def test_a_silent_cloud_holds_neither_the_constructor_nor_a_call():
    silent = ConnectingRunner(slow=True)
    begun = time.monotonic()
    hybrid = Hybrid(StraightRunner(), silent, Policy(500.0, min_margin=0.5))
    assert time.monotonic() - begun < 1.0 + LATE_S
    with ThreadPoolExecutor(8) as pool:
        predictions = list(pool.map(lambda _: hybrid.infer({"x": UNSURE}), range(8)))
    assert {p.source for p in predictions} == {"edge_degraded"}
    assert {p.reason for p in predictions} <= {"cloud_late", "circuit_open", "no_time_left"}
    assert max(p.timing_ms.total for p in predictions) < 500.0 + LATE_S * 1e3
    silent.close()
