"""What may be sent to the cloud: exact while the process lives, never too little after it died."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.hybrid import Hybrid
from outrider.policy import Budget, Policy, Spent
from outrider.spending import AHEAD_BYTES, AHEAD_REQUESTS, DAY_S, HOUR_S, Meter, Spending
from outrider_runtimes.errors import ConfigError, StateDirectoryError, StoreError
from support.runners import NumpyRunner

NOON_S = 20_000 * DAY_S + 12 * HOUR_S
UNSURE = {"x": np.array([[0.1, 0.0, 0.0, 0.0]], dtype=np.float32)}
POLICY = {"deadline_ms": 20_000.0, "min_margin": 0.5}
SIZE = 16  # bytes of one row, and of its answer


class Clock:
    def __init__(self, now_s: float = NOON_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def opened(path, clock=None) -> Spending:
    return Spending(path, clock=clock or Clock())


def told(prediction):
    return prediction.source, prediction.reason


# --- the rule


@given(st.integers(0, 10), st.integers(0, 100))
def test_no_limit_covers_everything_and_a_limit_covers_up_to_it(limit, size_bytes):
    assert Budget().covers(Spent(hour_requests=10**9, day_bytes=10**15), size_bytes)
    for requests in range(12):
        assert Budget(requests_per_hour=limit).covers(Spent(hour_requests=requests), 1) is (requests + 1 <= limit)
        assert Budget(requests_per_day=limit).covers(Spent(day_requests=requests), 1) is (requests + 1 <= limit)
    for spent in (0, 40, 99):
        assert Budget(bytes_per_hour=100).covers(Spent(hour_bytes=spent), size_bytes) is (spent + size_bytes <= 100)
        assert Budget(bytes_per_day=100).covers(Spent(day_bytes=spent), size_bytes) is (spent + size_bytes <= 100)


@pytest.mark.parametrize("value", [-1, 1.5, True, "many"])
def test_a_budget_is_a_whole_number(value):
    with pytest.raises(ConfigError, match=r"budget\.bytes_per_day is"):
        Budget(bytes_per_day=value)
    with pytest.raises(ConfigError, match=r"policy\.budget is 5"):
        Policy(80.0, budget=5)


# --- the account


def test_it_is_exact_while_the_process_lives_and_after_a_clean_close(tmp_path):
    spending = opened(tmp_path / "a.json")
    for at in range(200):
        spending.add(1, at)
    exact = Spent(hour_requests=200, hour_bytes=19_900, day_requests=200, day_bytes=19_900)
    assert spending.spent() == exact
    spending.close()
    assert opened(tmp_path / "a.json").spent() == exact


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3 * AHEAD_BYTES)), max_size=30), st.integers(0, 30))
def test_a_process_that_dies_has_never_spent_more_than_is_on_disk(tmp_path_factory, steps, dies_after):
    path = tmp_path_factory.mktemp("spent") / "a.json"
    spending = opened(path)
    for requests, size_bytes in steps[:dies_after]:
        spending.add(requests, size_bytes)
    real, kept = spending.spent(), opened(path).spent()
    for name in Spent.__slots__:
        ahead = AHEAD_REQUESTS if "requests" in name else AHEAD_BYTES
        assert getattr(real, name) <= getattr(kept, name) <= getattr(real, name) + ahead


def test_few_writes_are_needed(tmp_path):
    path = tmp_path / "a.json"
    spending, seen = opened(path), set()
    for _ in range(640):
        spending.add(1, 100)
        seen.add(path.stat().st_ino)
    assert len(seen) <= 11  # each write is a new file


def test_hours_and_days_begin_at_0_and_a_clock_that_goes_back_opens_none(tmp_path):
    clock = Clock()
    spending = opened(tmp_path / "a.json", clock)
    spending.add(3, 30)
    clock.now_s += HOUR_S
    assert spending.spent() == Spent(day_requests=3, day_bytes=30)
    spending.add(1, 1)
    clock.now_s -= 5 * HOUR_S
    assert spending.spent() == Spent(hour_requests=1, hour_bytes=1, day_requests=4, day_bytes=31)
    clock.now_s = 0.0  # a board whose clock was lost
    assert spending.spent().day_requests == 4
    clock.now_s = NOON_S + DAY_S
    assert spending.spent() == Spent()


def test_many_threads_lose_nothing(tmp_path):
    spending = opened(tmp_path / "a.json")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: spending.add(1, 7), range(800)))
    assert spending.spent().day_requests == 800
    assert spending.spent().hour_bytes == 5600


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"format": 2}', b'{"format": 1, "hour": -1}', b"x" * 5000, json.dumps({"format": 1}).encode()],
)
def test_a_file_that_is_none_of_ours_is_not_taken_for_zero(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.json is not an account") as caught:
        opened(tmp_path / "a.json")
    assert "move it away" in caught.value.hint


# --- obeyed


@pytest.fixture
def sides():
    edge, cloud = NumpyRunner(gain=1.0), NumpyRunner(gain=2.0)
    yield edge, cloud
    edge.close()
    cloud.close()


def test_the_cloud_is_asked_until_the_hour_is_spent_and_again_in_the_next(tmp_path, sides):
    edge, cloud = sides
    clock = Clock()
    policy = Policy(**POLICY, budget=Budget(requests_per_hour=3))
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=clock) as hybrid:
        answers = [told(hybrid.infer(UNSURE)) for _ in range(5)]
        assert answers == [("cloud", "uncertain")] * 3 + [("edge_degraded", "budget_spent")] * 2
        clock.now_s += HOUR_S
        assert told(hybrid.infer(UNSURE)) == ("cloud", "uncertain")
    assert cloud.submitted == 4
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=clock) as again:
        assert [told(again.infer(UNSURE))[0] for _ in range(3)] == ["cloud", "cloud", "edge_degraded"]


def test_bytes_count_what_goes_and_what_comes(tmp_path, sides):
    edge, cloud = sides
    policy = Policy(**POLICY, budget=Budget(bytes_per_day=5 * SIZE))
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=Clock()) as hybrid:
        # Two requests and their answers are 4 rows; a third row may go, and its answer is what it is.
        assert [told(hybrid.infer(UNSURE))[1] for _ in range(4)] == [*["uncertain"] * 3, "budget_spent"]


def test_a_budget_that_cannot_be_written_down_is_not_spent(tmp_path, sides):
    edge, cloud = sides
    policy = Policy(**POLICY, budget=Budget(requests_per_day=100))
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=Clock()) as hybrid:
        (tmp_path / "offload").write_text("a file where the folder should be")
        assert told(hybrid.infer(UNSURE)) == ("edge_degraded", "budget_spent")
        assert cloud.submitted == 0


def test_a_state_directory_that_cannot_be_used_is_told_at_once(tmp_path, sides):
    (tmp_path / "state").write_text("")
    with pytest.raises(StateDirectoryError):
        Hybrid(*sides, Policy(**POLICY, budget=Budget(requests_per_day=1)), state=tmp_path / "state")


def test_what_a_meter_cannot_write_about_an_answer_is_logged(tmp_path, caplog):
    spending = opened(tmp_path / "offload" / "a.json")
    (tmp_path / "offload").write_text("")
    Meter(Budget(), spending).received({"y": np.zeros(2 * AHEAD_BYTES, np.uint8)})
    assert "is not on disk" in caplog.text
