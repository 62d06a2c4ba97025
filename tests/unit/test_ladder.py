"""The ladder: its rule on made-up boards, and real models that step by it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.admission import remembered
from outrider.installer import install
from outrider.ladder import LONGEST_HOLD_S, Ladder, Rules, Standing, decide
from outrider.model import load
from outrider.opening import Opened, Wanted, open_choice
from outrider.serving import Change, Serving
from outrider.store import Store
from outrider_runtimes.errors import ConfigError, InferenceError, ModelLoadError
from outrider_runtimes.heat import Heat
from support.realbundles import ONNX, TFLITE, expected, images, make_real_bundle
from support.runners import until

RULES = Rules(latency_ms=20.0, calls=4)
COOL, WARM, HOT = (Heat(celsius=c, throttled=False) for c in (50.0, 75.0, 85.0))
LATE, FINE = [30.0] * 4, [10.0] * 4


def at(rung: int = 0, **fields: Any) -> Standing:
    return Standing(rung=rung, **{"hold_s": RULES.hold_s, **fields})


@pytest.mark.parametrize(
    ("heat", "taken_ms", "steps"),
    [
        (HOT, LATE, True),
        (Heat(celsius=60.0, throttled=True), LATE, True),
        (Heat(celsius=60.0, throttled=False, undervolted=True), LATE, True),
        (Heat(), LATE, True),  # nothing is known: heat may be why
        (Heat(celsius=60.0, throttled=False, ceiling=0.5), LATE, False),  # an operator's limit is not heat
        (WARM, LATE, False),  # something else makes it late
        (COOL, LATE, False),
        (HOT, FINE, False),  # hot, and the bound holds all the same
        (HOT, LATE[:3], False),  # too few calls to say
        (HOT, [10.0, 10.0, 30.0, 30.0], False),  # the median is 20
        (HOT, [*FINE, *LATE], True),  # the latest count
    ],
)
def test_a_step_down_takes_a_late_median_and_heat(heat: Heat, taken_ms: list[float], steps: bool) -> None:
    standing, step = decide(at(), RULES, heat, taken_ms, rungs=2, now_s=100.0)
    assert (standing.rung, step is not None) == (int(steps), steps)
    if step is not None:
        assert step.kind == "step_down"
        assert "its calls take 30 ms, at most 20 ms is allowed" in step.reason


def test_there_is_no_step_below_the_last_rung() -> None:
    assert decide(at(1), RULES, HOT, LATE, rungs=2, now_s=100.0)[1] is None


def walk(standing: Standing, looks: Sequence[tuple[float, Heat, list[float]]]) -> tuple[Standing, list[str]]:
    """The standing after some looks ``(now_s, heat, taken_ms)``, and when which step came."""
    steps = []
    for now_s, heat, taken_ms in looks:
        standing, step = decide(standing, RULES, heat, taken_ms, rungs=3, now_s=now_s)
        if step is not None:
            steps.append(f"{now_s:g} {step.kind}")
    return standing, steps


def test_a_step_up_takes_a_cool_while_without_a_break() -> None:
    _, steps = walk(at(1), [(0, COOL, FINE), (29, COOL, FINE), (30, COOL, FINE)])
    assert steps == ["30 step_up"]
    _, steps = walk(at(1), [(0, COOL, FINE), (20, WARM, FINE), (30, COOL, FINE), (59, COOL, FINE), (60, COOL, FINE)])
    assert steps == ["60 step_up"]
    _, steps = walk(at(1), [(0, COOL, FINE), (29, COOL, LATE), (31, COOL, FINE), (60, COOL, FINE)])
    assert steps == []


def test_between_hot_and_cool_nothing_is_done() -> None:
    standing, steps = walk(at(1), [(t, WARM, FINE) for t in range(0, 1000, 10)])
    assert (standing.rung, steps) == (1, [])


def test_each_rung_up_waits_again() -> None:
    _, steps = walk(at(2), [(t, COOL, FINE) for t in range(0, 200, 10)])
    assert steps == ["30 step_up", "70 step_up"]


def test_a_step_up_that_does_not_last_doubles_the_wait_and_one_that_does_resets_it() -> None:
    standing = at(1)
    now_s, waits = 0.0, []
    for _ in range(4):
        begun = now_s
        while standing.rung:
            standing, _ = decide(standing, RULES, COOL, FINE, rungs=2, now_s=now_s)
            now_s += 1.0
        waits.append(now_s - 1 - begun)
        standing, step = decide(standing, RULES, HOT, LATE, rungs=2, now_s=now_s)
        assert step is not None
    assert waits == [30.0, 60.0, 120.0, 240.0]
    standing, _ = walk(standing, [(now_s, COOL, FINE), (now_s + 480, COOL, FINE)])
    assert standing.rung == 0
    standing, _ = decide(standing, RULES, HOT, LATE, rungs=2, now_s=now_s + 1000)
    assert standing.hold_s == 30.0


heats = st.builds(
    Heat,
    celsius=st.none() | st.floats(20, 110),
    throttled=st.none() | st.booleans(),
    undervolted=st.booleans(),
)
looks = st.lists(st.tuples(st.floats(0.1, 100.0), heats, st.lists(st.floats(1.0, 60.0), max_size=8)), max_size=60)


@given(looks, st.integers(2, 4))
def test_whatever_comes_it_stays_on_the_ladder_and_never_climbs_into_heat(
    seen: list[tuple[float, Heat, list[float]]], rungs: int
) -> None:
    standing, now_s, cool_since_s = Standing(hold_s=RULES.hold_s), 0.0, None
    for later_s, heat, taken_ms in seen:
        now_s += later_s
        cool = not heat.throttled and not heat.undervolted and (heat.celsius is None or heat.celsius < 70)
        cool_since_s = (now_s if cool_since_s is None else cool_since_s) if cool else None
        before = standing
        standing, step = decide(before, RULES, heat, taken_ms, rungs=rungs, now_s=now_s)
        assert 0 <= standing.rung < rungs and abs(standing.rung - before.rung) == (step is not None)
        assert RULES.hold_s <= standing.hold_s <= LONGEST_HOLD_S
        if step is not None and step.kind == "step_up":
            assert cool_since_s is not None and now_s - cool_since_s >= before.hold_s


# -- real models


class Board:
    """A ladder over a real bundle on a board whose heat and time are the test's. No thread: the test looks."""

    def __init__(self, folder: Path, *, latency_ms: float, resident: bool = False) -> None:
        make_real_bundle(folder / "b.outrider", formats=("onnx", "tflite"))
        install(folder / "b.outrider", state=folder / "state")
        self.installed = Store(folder / "state").installed("tiny")
        self.zone = folder / "root/sys/class/thermal/thermal_zone0/temp"
        self.zone.parent.mkdir(parents=True)
        self.now_s = 0.0
        self.opened: list[str] = []
        self.broken: set[str] = set()
        self.changes: list[Change] = []
        self.serving = Serving(self.open(ONNX))
        self.serving.on_change(lambda _, change: self.changes.append(change))
        self.ladder = Ladder(
            self.serving,
            [ONNX, TFLITE],
            Rules(latency_ms=latency_ms, calls=4),
            self.open,
            resident=resident,
            root=folder / "root",
            clock=lambda: self.now_s,
        )

    def open(self, variant: str) -> Opened:
        if variant in self.broken:
            raise ModelLoadError("broken")
        self.opened.append(variant)
        (admission, *_) = remembered(self.installed.choice)
        return open_choice(self.installed, admission, Wanted(variant=variant), verified=False)

    def run(self, celsius: float, *, calls: int = 4, later_s: float = 1.0) -> list[str]:
        """Some calls at a temperature, then a look; which variants answered."""
        self.zone.write_text(str(int(celsius * 1000)))
        served = []
        for _ in range(calls):
            answer = self.serving.run({"image": images(1)})
            assert np.allclose(answer.outputs["logits"], expected(images(1)), atol=1e-4)
            assert answer.served is not None
            served.append(answer.served.variant)
        self.now_s += later_s
        self.ladder.look()
        return served


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path, latency_ms=1e-9)  # which no call holds
    yield board
    board.serving.close()


@pytest.mark.slow
def test_a_hot_board_steps_down_and_a_cool_one_up_and_each_answer_names_its_variant(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert board.run(50.0) == [ONNX] * 4
        assert board.run(85.0, calls=1) == [ONNX]
        assert board.run(85.0, calls=1) == [TFLITE]
    assert [(change.kind, change.after.variant) for change in board.changes] == [("step_down", TFLITE)]
    assert "tiny: step_down to tflite-float32: its calls take" in caplog.text and "at 85 C" in caplog.text
    board.run(50.0, calls=0, later_s=1.0)
    board.run(50.0, calls=0, later_s=30.0)
    assert board.run(50.0) == [ONNX] * 4
    assert [change.kind for change in board.changes] == ["step_down", "step_up"]
    assert board.opened == [ONNX, TFLITE, ONNX]


@pytest.mark.slow
def test_what_was_stepped_away_from_is_closed_unless_it_shall_stay(tmp_path: Path) -> None:
    for resident in (False, True):
        folder = tmp_path / str(resident)
        folder.mkdir()
        board = Board(folder, latency_ms=1e-9, resident=resident)
        first = board.serving._opened.session
        board.run(85.0)
        assert board.serving.served.variant == TFLITE
        if resident:
            assert first.run({"image": images(1)}).outputs
        else:
            with pytest.raises(InferenceError, match="closed"):
                first.run({"image": images(1)})
        board.run(50.0, calls=0)
        board.run(50.0, calls=0, later_s=30.0)
        assert (board.serving._opened.session is first) == resident
        assert board.opened == [ONNX, TFLITE] + [ONNX] * (not resident)
        board.run(85.0)
        board.serving.close()
        with pytest.raises(InferenceError, match="closed"):
            first.run({"image": images(1)})


@pytest.mark.slow
def test_what_comes_after_the_end_is_freed_and_told_to_nobody(board: Board) -> None:
    late = board.open(TFLITE)
    board.serving.close()
    assert board.serving.replace(late, kind="step_down", reason="too late") is None
    with pytest.raises(InferenceError, match="closed"):
        late.session.run({"image": images(1)})
    assert board.changes == []


@pytest.mark.slow
def test_a_variant_that_cannot_be_loaded_leaves_the_one_that_serves(board: Board) -> None:
    board.broken.add(TFLITE)
    assert board.run(85.0) + board.run(85.0) == [ONNX] * 8
    assert board.changes == []
    board.broken.clear()
    assert board.run(85.0) == [ONNX] * 4  # late, and now there is a way
    assert board.serving.served.variant == TFLITE


@pytest.mark.slow
def test_steps_under_load_lose_no_call(board: Board) -> None:
    answers: list[str] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def client() -> None:
        try:
            while not stop.is_set():
                answer = board.serving.run({"image": images(2)})
                assert np.allclose(answer.outputs["logits"], expected(images(2)), atol=1e-4)
                assert answer.served is not None
                answers.append(answer.served.variant)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    until(lambda: ONNX in answers or failures)
    for _ in range(10):
        board.run(85.0)
        board.run(50.0, calls=0)
        board.run(50.0, calls=0, later_s=LONGEST_HOLD_S)
    board.run(85.0)
    until(lambda: TFLITE in answers or failures)
    stop.set()
    for thread in clients:
        thread.join(60.0)
    assert failures == []
    assert {ONNX, TFLITE} == set(answers)


@pytest.mark.slow
@pytest.mark.parametrize("resident", [False, True])
def test_a_step_that_overlaps_a_rollback_does_not_put_the_failed_bundle_back(tmp_path: Path, resident: bool) -> None:
    board = Board(tmp_path, latency_ms=1e-9, resident=resident)
    make_real_bundle(tmp_path / "other.outrider", name="other", seed=1)
    install(tmp_path / "other.outrider", state=tmp_path / "state")
    other = Store(tmp_path / "state").installed("other")
    good = open_choice(other, remembered(other.choice)[0], Wanted(), verified=False)
    stepped: list[Opened] = []

    def open_late(variant: str) -> Opened:
        stepped.append(board.open(variant))
        board.serving.replace(good, kind="rollback", reason="a NaN")  # while the rung is loaded
        return stepped[0]

    board.ladder._open = open_late
    board.run(85.0)
    assert [change.kind for change in board.changes] == ["rollback"]
    assert board.serving.served.bundle == other.digest
    with pytest.raises(InferenceError, match="closed"):
        stepped[0].session.run({"image": images(1)})
    board.ladder.look()
    assert [change.kind for change in board.changes] == ["rollback"]
    board.serving.close()


@pytest.mark.slow
def test_load_with_a_ladder_serves_its_first_variant_and_close_ends_its_thread(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    before = {thread.name for thread in threading.enumerate()}
    with load(tmp_path / "b.outrider", state=tmp_path, ladder=[TFLITE, ONNX], latency_ms=1e6) as model:
        assert model.infer(images()).variant == TFLITE
        assert model.infer(images(), deadline_ms=60_000.0).variant == TFLITE
        assert "outrider-ladder" in {thread.name for thread in threading.enumerate()}
    assert {thread.name for thread in threading.enumerate()} - before <= {"outrider-worker"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ladder": [ONNX], "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": [ONNX, ONNX], "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": "onnx", "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": [ONNX, None], "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": {ONNX, TFLITE}, "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": (name for name in (ONNX, TFLITE)), "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": [[ONNX], [TFLITE]], "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": 3, "latency_ms": 1.0}, "expected two variants or more"),
        ({"ladder": [ONNX, TFLITE]}, "needs latency_ms"),
        ({"ladder": [ONNX, TFLITE], "latency_ms": "5"}, "a number above 0; it is '5'"),
        ({"ladder": [ONNX, TFLITE], "latency_ms": True}, "a number above 0; it is True"),
        ({"ladder": [ONNX, TFLITE], "latency_ms": float("inf")}, "a number above 0; it is inf"),
        ({"latency_ms": 5.0}, "for a ladder, and there is none"),
        ({"ladder_resident": True}, "for a ladder, and there is none"),
        ({"ladder": [ONNX, TFLITE], "latency_ms": float("nan")}, "needs latency_ms"),
        ({"ladder": [ONNX, TFLITE], "latency_ms": 1.0, "variant": ONNX}, "exclude each other"),
        ({"ladder": [ONNX, "none"], "latency_ms": 1.0}, "no variant 'none'"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, asked: dict[str, Any], says: str
) -> None:
    state = tmp_path / "state"
    if asked.get("ladder") == [ONNX, "none"]:
        make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
        install(tmp_path / "b.outrider", state=state)
    with pytest.raises(ConfigError, match=says):
        load("tiny", state=state, **asked)
