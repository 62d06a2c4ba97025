"""What may be sent to the cloud: exact while the process lives, never too little after it died."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import spending as spending_module
from outrider.hybrid import Hybrid
from outrider.policy import Budget, Policy, Spent
from outrider.spending import AHEAD_BYTES, AHEAD_REQUESTS, DAY_S, HOUR_S, Meter, Spending, open_meter
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, StateDirectoryError, StoreError
from support import threads
from support.clocks import ManualClock
from support.effort import effort
from support.runners import NumpyRunner, told, until
from support.sides import SURE, UNSURE
from support.straight import StraightRunner

NOON_S = 20_000 * DAY_S + 12 * HOUR_S
POLICY = {"deadline_ms": 120_000.0, "min_margin": 0.5}
SIZE = 16  # bytes of one row, and of its answer


def opened(path, clock=None) -> Spending:
    return Spending(path, clock=clock or ManualClock(NOON_S))


@pytest.fixture(autouse=True)
def no_card_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending_module, "CLOSE_MS", 120_000.0)


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


@settings(max_examples=effort(40), deadline=None)
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
    assert len(seen) <= 640 / (AHEAD_REQUESTS / 2) + 1  # each write is a new file, and begins at half of the reserve


def test_hours_and_days_begin_at_0_and_a_clock_that_goes_back_opens_none(tmp_path):
    clock = ManualClock(NOON_S)
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
def sides(edge, cloud):
    return edge, cloud


def test_the_cloud_is_asked_until_the_hour_is_spent_and_again_in_the_next(tmp_path, sides):
    edge, cloud = sides
    clock = ManualClock(NOON_S)
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
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=ManualClock(NOON_S)) as hybrid:
        # Two requests and their answers are 4 rows; a third row may go, and its answer is what it is.
        assert [told(hybrid.infer(UNSURE))[1] for _ in range(4)] == [*["uncertain"] * 3, "budget_spent"]


def test_a_budget_that_cannot_be_written_down_is_not_spent(tmp_path, sides):
    edge, cloud = sides
    policy = Policy(**POLICY, budget=Budget(requests_per_day=100))
    with Hybrid(edge, cloud, policy, state=tmp_path, wall=ManualClock(NOON_S)) as hybrid:
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


# --- a card that is slow, or hangs


class Card:
    """What files are written to: ``hold()`` keeps every write from ending until ``let_go()``."""

    def __init__(self, monkeypatch) -> None:
        self._free = threading.Event()
        self._free.set()
        self.writes = 0
        real = spending_module.atomic_file

        def waiting(path, **options):
            self.writes += 1
            self._free.wait(120.0)
            return real(path, **options)

        monkeypatch.setattr(spending_module, "atomic_file", waiting)

    def hold(self) -> None:
        self._free.clear()

    def let_go(self) -> None:
        self._free.set()


@pytest.fixture
def card(monkeypatch):
    card = Card(monkeypatch)
    yield card
    card.let_go()


def test_a_card_that_hangs_holds_no_call_beyond_its_deadline(card, tmp_path):
    writers, spending = threads.since_now("outrider-spending"), opened(tmp_path / "a.json")
    card.hold()
    for _ in range(20):
        assert spending.add(1, 10, deadline=Deadline.after_ms(2.0)) is False
    assert spending.spent() == Spent()  # what could not be written down was not spent, and the question is answered
    until(lambda: card.writes == 1)
    assert len(writers()) == 1
    card.let_go()
    assert spending.add(1, 10) is True
    assert spending.spent().hour_requests == 1


def test_a_hybrid_whose_card_hangs_answers_from_the_edge(card, tmp_path, clock):
    edge, cloud = StraightRunner(), NumpyRunner()
    policy = Policy(**{**POLICY, "deadline_ms": 500.0}, budget=Budget(requests_per_day=5))
    with Hybrid(edge, cloud, policy, state=tmp_path, root=tmp_path, clock=clock, wall=ManualClock(NOON_S)) as hybrid:
        card.hold()
        for _ in range(2):
            assert told(hybrid.infer(UNSURE)) == ("edge_degraded", "budget_spent")
        assert cloud.submitted == 0
        card.let_go()
        assert told(hybrid.infer(UNSURE, deadline_ms=120_000.0)) == ("cloud", "uncertain")
    edge.close()
    cloud.close()


def test_an_audit_waits_for_no_card(card, tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.hybrid.audits.AUDIT_MS", 240_000.0)  # longer than the card hangs
    edge, cloud = NumpyRunner(), NumpyRunner()
    policy = Policy(120_000.0, min_margin=0.5, audit_share=1.0, audit_allowed=0.02, budget=Budget(requests_per_day=5))
    with Hybrid(edge, cloud, policy, state=tmp_path, root=tmp_path, wall=ManualClock(NOON_S)) as hybrid:
        card.hold()
        for _ in range(3):
            assert told(hybrid.infer(SURE)) == ("edge", "confident")
        until(lambda: card.writes == 1)
        assert cloud.submitted == 0
        card.let_go()
        until_idle(hybrid._own_meter._spending)
        assert told(hybrid.infer(SURE)) == ("edge", "audit")
    edge.close()
    cloud.close()


def test_a_hedge_waits_for_the_card_no_longer_than_for_the_edge(card, tmp_path):
    edge, cloud = NumpyRunner(), NumpyRunner()
    policy = Policy(60_000.0, hedge_after_ms=0.0, budget=Budget(requests_per_day=5))
    with (
        Hybrid(edge, cloud, policy, state=tmp_path, root=tmp_path, wall=ManualClock(NOON_S)) as hybrid,
        ThreadPoolExecutor(1) as pool,
    ):
        card.hold()
        edge.hold()
        answer = pool.submit(hybrid.infer, SURE)
        until(lambda: card.writes == 1)
        edge.let_go()
        assert told(answer.result()) == ("edge", "edge")
        assert cloud.submitted == 0  # the card still hangs
        card.let_go()
    edge.close()
    cloud.close()


def test_what_is_reserved_is_written_before_it_is_needed_so_that_a_call_rarely_waits(card, tmp_path):
    """After the first write, half of the reserve is spent before the next one begins, and the other half meanwhile."""
    spending = opened(tmp_path / "a.json")
    assert spending.add(1, 0)
    for _ in range(AHEAD_REQUESTS // 2):
        assert spending.add(1, 0)
    until_idle(spending)
    card.hold()
    spent = 0
    while spending.add(1, 0, deadline=Deadline.after_ms(1.0)):
        spent += 1
    assert spent >= AHEAD_REQUESTS // 2 - 1
    card.let_go()


def until_idle(spending) -> None:
    until(lambda: spending._writing is None, 120.0)


def test_an_answer_that_came_is_owed_where_it_cannot_be_written_down_in_time(card, tmp_path):
    spending = opened(tmp_path / "a.json")
    assert spending.add(1, 10)
    card.hold()
    answer = {"y": np.zeros(2 * AHEAD_BYTES, np.uint8)}
    Meter(Budget(), spending).received(answer, Deadline.after_ms(1.0))
    assert spending.spent().hour_bytes == 10 + 2 * AHEAD_BYTES
    card.let_go()
    spending.close()
    assert opened(tmp_path / "a.json").spent().hour_bytes == 10 + 2 * AHEAD_BYTES


def test_a_card_that_hangs_does_not_hold_close_for_ever(card, tmp_path, monkeypatch):
    monkeypatch.setattr(spending_module, "CLOSE_MS", 5.0)
    spending = opened(tmp_path / "a.json")
    assert spending.add(1, 10)
    card.hold()
    with pytest.raises(StoreError, match="in time"):
        spending.close()


def test_bytes_that_are_no_request_count_as_bytes_alone(tmp_path):
    meter = open_meter(Budget(requests_per_day=1, bytes_per_day=100), state=tmp_path)
    assert meter.take_bytes(60)
    assert meter.take({"x": np.zeros(40, np.uint8)})
    assert not meter.take_bytes(1)
    meter.close()
    assert opened(tmp_path / "link.json", time.time).spent().day_requests == 1


def test_a_clock_that_was_ahead_once_blocks_nothing_when_it_is_right(tmp_path):
    clock = ManualClock(NOON_S + 3000 * DAY_S)
    ahead = opened(tmp_path / "link.json", clock)
    assert ahead.add(2, 20)
    ahead.close()
    clock.now_s = NOON_S
    spending = opened(tmp_path / "link.json", clock)
    kept = Spent(hour_requests=2, hour_bytes=20, day_requests=2, day_bytes=20)
    assert spending.spent() == kept, "what was spent counts"
    assert spending.add(1, 1)
    spending.close()
    clock.now_s += HOUR_S
    assert opened(tmp_path / "link.json", clock).spent() == Spent(day_requests=3, day_bytes=21)
    clock.now_s += DAY_S
    assert opened(tmp_path / "link.json", clock).spent() == Spent()


def test_while_nothing_keeps_the_clock_right_hours_last_by_the_time_that_passes(tmp_path):
    clock, steady, right = ManualClock(NOON_S), ManualClock(50.0), [True]
    spending = Spending(tmp_path / "a.json", clock=clock, synchronised=lambda: right[0], steady=steady)
    assert spending.add(1, 1)
    right[0] = False
    for wrong_s in (NOON_S + 300 * DAY_S, 0.0, NOON_S + 2 * HOUR_S):
        clock.now_s = wrong_s
        assert spending.spent().hour_requests == 1
    steady.now_s += HOUR_S
    assert spending.spent() == Spent(day_requests=1, day_bytes=1)
    steady.now_s += DAY_S
    assert spending.spent() == Spent()
    right[0], clock.now_s = True, NOON_S + DAY_S + 2 * HOUR_S
    assert spending.add(1, 1)
    assert spending.spent() == Spent(hour_requests=1, hour_bytes=1, day_requests=1, day_bytes=1)


def test_a_clock_of_which_nobody_knows_takes_no_day_back(tmp_path):
    clock = ManualClock(NOON_S)
    spending = Spending(tmp_path / "a.json", clock=clock, synchronised=lambda: None)
    assert spending.add(1, 1)
    clock.now_s -= 30 * DAY_S
    assert spending.spent().day_requests == 1
    clock.now_s += DAY_S
    assert spending.spent().day_requests == 1
