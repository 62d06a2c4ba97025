"""Each reason of a Hybrid to ask the cloud or to stay, by its name in the prediction and its switch in the policy."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Budget, Policy
from outrider_runtimes.errors import InferenceError, QueueFull, RemoteUnavailable, ShapeError
from support.runners import ConnectingRunner, told, until
from support.sides import GENEROUS_MS, SURE, UNSURE
from support.straight import StraightRunner
from support.trees import tree

ZONE = "sys/class/thermal/thermal_zone0/temp"
COOLING = "sys/class/thermal/cooling_device0"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
BATTERY = "sys/class/power_supply/BAT0"
BOARDS = {
    "hot": {ZONE: "85000"},
    "throttled": {ZONE: "60000", f"{COOLING}/type": "thermal-cpufreq-0", f"{COOLING}/cur_state": "2"},
    "low_power": {FIRMWARE: "1"},
    "low_power, battery": {
        f"{BATTERY}/type": "Battery",
        f"{BATTERY}/status": "Discharging",
        f"{BATTERY}/capacity": "9",
    },
}
OFF = {
    "hot": {"hot_c": None},
    "throttled": {"offload_when_throttled": False},
    "low_power": {"offload_when_low_power": False},
    "low_power, battery": {"low_battery": 0.05},
}


@pytest.fixture
def edge(edge):
    edge.expected_ms = 1.0
    return edge


def on(edge, cloud, root: Path, policy: Policy, **options: Any) -> Hybrid:
    """A hybrid that has looked at its board."""
    hybrid = Hybrid(edge, cloud, policy, root=root, **options)
    if hybrid._board is not None:
        hybrid._board.look()
    return hybrid


# --- the board


@pytest.mark.parametrize("kind", BOARDS)
def test_a_strained_board_is_spared_and_the_reason_says_why(edge, cloud, tmp_path, kind):
    root = tree(tmp_path, BOARDS[kind])
    with on(edge, cloud, root, Policy(GENEROUS_MS)) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("cloud", kind.partition(",")[0])
        assert told(hybrid.infer({"x": SURE}, private=True)) == ("edge", "edge")
    with on(edge, cloud, root, Policy(GENEROUS_MS, **OFF[kind])) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")


def test_a_cloud_that_cannot_leaves_a_strained_board_to_answer(edge, cloud, tmp_path):
    with on(edge, cloud, tree(tmp_path, BOARDS["hot"]), Policy(GENEROUS_MS, failures_in_a_row=1)) as hybrid:
        cloud.error = lambda: RemoteUnavailable("down")
        assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "cloud_unavailable")
        assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")  # as good an answer: the board was to be spared


def test_a_stuck_cloud_leaves_a_strained_board_the_time_it_needs(cloud, tmp_path, clock):
    """No request is late because the board was to be spared: the cloud gets only what the edge does not need."""
    edge = StraightRunner()
    edge.expected_ms = 300.0
    cloud.hold()
    with on(edge, cloud, tree(tmp_path, BOARDS["hot"]), Policy(900.0), clock=clock) as hybrid:
        prediction = hybrid.infer({"x": SURE})
    assert told(prediction) == ("edge_degraded", "cloud_late")
    assert prediction.timing_ms.total >= 900.0 - 300.0 - 2.0 - 1.0


def test_an_edge_that_was_never_measured_is_asked_beside_the_cloud(edge, cloud, tmp_path):
    edge.expected_ms = None
    with on(edge, cloud, tree(tmp_path, BOARDS["hot"]), Policy(GENEROUS_MS)) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("cloud", "hot")
        assert edge.submitted == 1


def test_nobody_looks_at_the_board_where_no_reason_is_on(edge, cloud, tmp_path):
    policy = Policy(GENEROUS_MS, hot_c=None, offload_when_throttled=False, offload_when_low_power=False)
    with on(edge, cloud, tree(tmp_path, BOARDS["hot"]), policy) as hybrid:
        before = set(threading.enumerate())
        assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")
        assert set(threading.enumerate()) <= before


def test_a_hybrid_that_was_dropped_leaves_no_thread(edge, cloud, tmp_path):
    before = set(threading.enumerate())
    hybrid = Hybrid(edge, cloud, Policy(GENEROUS_MS), root=tmp_path)
    hybrid.infer({"x": SURE})
    (looking,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "outrider-strain"]
    del hybrid
    gc.collect()
    looking.join(60.0)
    assert not looking.is_alive()


# --- the task


def test_a_task_of_the_cloud_goes_there_and_the_edge_is_a_stopgap(edge, cloud, tmp_path):
    edge.cloud_only = True
    with on(edge, cloud, tmp_path, Policy(GENEROUS_MS, min_margin=0.5, failures_in_a_row=1)) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("cloud", "cloud_only")
        assert edge.submitted == 0
        assert told(hybrid.infer({"x": SURE}, private=True)) == ("edge_degraded", "private")
        cloud.error = lambda: RemoteUnavailable("down")
        assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "cloud_unavailable")
        assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "circuit_open")
    with on(edge, cloud, tmp_path, Policy(GENEROUS_MS, obey_cloud_only=False)) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("edge", "edge")


# --- where the edge has no answer


@pytest.mark.parametrize(
    ("error", "reason", "switch"),
    [
        (QueueFull("full"), "queue", "offload_when_queued"),
        (ShapeError("the file takes T = 8", tensor="x"), "shape", "offload_beyond_shape"),
        (InferenceError("broke"), "edge_failed", "offload_when_failed"),
        (MemoryError("a copy"), "edge_failed", "offload_when_failed"),
    ],
)
def test_an_edge_without_an_answer_is_helped_unless_that_is_switched_off(edge, cloud, tmp_path, error, reason, switch):
    edge.refusal = lambda: error
    with on(edge, cloud, tmp_path, Policy(GENEROUS_MS)) as hybrid:
        assert told(hybrid.infer({"x": SURE})) == ("cloud", reason)
    asked = cloud.submitted
    with on(edge, cloud, tmp_path, Policy(GENEROUS_MS, **{switch: False})) as hybrid, pytest.raises(type(error)):
        hybrid.infer({"x": SURE})
    assert cloud.submitted == asked


# --- reasons to stay


def test_callers_at_the_same_time_never_spend_more_than_the_budget(edge, cloud, tmp_path):
    """All of them see that the budget covers one more; only as many as it covers leave."""
    policy = Policy(GENEROUS_MS, min_margin=0.5, budget=Budget(requests_per_day=5))
    with Hybrid(edge, cloud, policy, state=tmp_path, root=tmp_path) as hybrid:
        edge.hold()
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(told(hybrid.infer({"x": UNSURE})))) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        until(lambda: edge.submitted == 16)
        edge.let_go()  # the budget was looked at by each before any of them spent
        for thread in threads:
            thread.join(120.0)
    assert cloud.submitted == 5
    assert sorted(answers) == [("cloud", "uncertain")] * 5 + [("edge_degraded", "budget_spent")] * 11


def test_a_cloud_of_another_interface_is_a_reason_to_stay_for_every_reason_to_leave(edge, tmp_path):
    from support.runners import OTHER_INTERFACE

    late = ConnectingRunner(down=True, interface=OTHER_INTERFACE)
    edge.cloud_only = True
    with on(edge, late, tree(tmp_path, BOARDS["hot"]), Policy(GENEROUS_MS)) as hybrid:
        late.down = False
        for _ in range(3):
            assert told(hybrid.infer({"x": SURE})) == ("edge_degraded", "interface_mismatch")
    assert late.submitted == 0
    late.close()
