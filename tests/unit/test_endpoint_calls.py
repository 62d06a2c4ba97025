"""What a request waits for: answers that end in other threads, and what ends the wait before them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from outrider.endpoint import calls
from outrider.endpoint.calls import FAST_S, Call, Ended
from outrider_runtimes.errors import DeadlineExceeded, InferenceError, RunnerClosed
from outrider_runtimes.runner import Answer, Timing
from support.clocks import ManualClock

LONG_S = 60.0


def answer(number: int) -> Answer:
    return Answer({}, Timing(total=float(number)))


async def waited(futures: list[Future[Answer]], *, timeout_s: float = LONG_S, of: list[Call] | None = None):
    """What each one's wait ends with."""
    ended = Ended(asyncio.get_running_loop())
    of = of or [Call(str(at), 0.0) for at in range(len(futures))]
    waits = [call.wait(future, ended.of(future), timeout_s) for call, future in zip(of, futures, strict=True)]
    return await asyncio.gather(*waits, return_exceptions=True)


def test_each_is_told_of_its_own_whatever_thread_it_ends_in():
    futures: list[Future[Answer]] = [Future() for _ in range(600)]
    start = threading.Barrier(4)

    def end(some: range) -> None:
        start.wait()
        for at in some:
            futures[at].set_result(answer(at))

    threads = [threading.Thread(target=end, args=(range(at, 600, 3),)) for at in range(3)]

    async def both() -> list[Answer]:
        for thread in threads:
            thread.start()
        start.wait()
        return await waited(futures)

    got = asyncio.run(both())
    for thread in threads:
        thread.join()
    assert [each.timing_ms.total for each in got] == list(map(float, range(600)))


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_of_fast_answers_the_last_one_tells_and_a_slow_one_tells_at_once(monkeypatch):
    monkeypatch.setattr(calls, "LOOK_S", LONG_S)  # the loop's own look comes too late for this test
    clock = ManualClock()

    async def one_after_the_other() -> None:
        ended = Ended(asyncio.get_running_loop(), clock=clock)

        async def told(gap_s: float, *, later: int) -> list[bool]:
            """Which of three are known in the loop when the first has ended, and then ``later`` more."""
            futures: list[Future[Answer]] = [Future() for _ in range(3)]
            waits = [ended.of(future) for future in futures]
            for future in futures[: 1 + later]:
                clock.now_s += gap_s
                future.set_result(answer(0))
            await turns()
            known = [wait.done() for wait in waits]
            for future in futures[1 + later :]:
                future.set_result(answer(0))
            await turns()
            assert all(wait.done() for wait in waits)
            return known

        assert await told(2 * FAST_S, later=0) == [True, False, False]
        assert await told(FAST_S / 2, later=0) == [False, False, False]
        assert await told(FAST_S / 2, later=1) == [False, False, False]
        assert await told(FAST_S / 2, later=2) == [True, True, True]
        assert await told(2 * FAST_S, later=0) == [True, False, False]

    asyncio.run(one_after_the_other())


def test_a_fast_answer_waits_for_no_other_that_never_comes():
    """The loop looks of its own, again after a time in which there was nothing to find."""

    async def beside_a_stuck_one() -> None:
        ended = Ended(asyncio.get_running_loop(), clock=ManualClock())  # no time passes: all are fast
        stuck = ended.of(Future())
        for _ in range(3):
            for _ in range(20):
                future: Future[Answer] = Future()
                wait = ended.of(future)
                future.set_result(answer(0))
                await asyncio.wait_for(wait, LONG_S)
            while ended._looks:
                await asyncio.sleep(0.001)
        assert not stuck.done()

    asyncio.run(beside_a_stuck_one())


def test_what_had_ended_before_is_not_waited_for_and_errors_come_as_they_are():
    done, failed, cancelled = Future(), Future(), Future()
    done.set_result(answer(1))
    failed.set_exception(error := InferenceError("the engine failed"))
    cancelled.cancel()
    first, second, third = asyncio.run(waited([done, failed, cancelled]))
    assert first == answer(1) and second is error
    assert isinstance(third, RunnerClosed)


def test_a_wait_that_is_cut_ends_with_the_reason_and_what_has_not_begun_is_not_run():
    future: Future[Answer] = Future()
    call = Call("a", 0.0)

    async def cut() -> list[object]:
        wait = asyncio.ensure_future(waited([future], of=[call]))
        for _ in range(5):  # turns of the loop until it waits
            await asyncio.sleep(0)
        call.cut(DeadlineExceeded("stop"))
        return await wait

    (why,) = asyncio.run(cut())
    assert isinstance(why, DeadlineExceeded) and str(why) == "stop"
    assert future.cancelled()


def test_time_that_passes_cuts_it_too():
    future: Future[Answer] = Future()
    (why,) = asyncio.run(waited([future], timeout_s=0.0))
    assert isinstance(why, DeadlineExceeded) and future.cancelled()


def test_a_cut_before_the_wait_is_not_forgotten():
    call = Call("a", 0.0)
    call.check()
    call.cut(DeadlineExceeded("stop"))
    call.hang_up()
    with pytest.raises(DeadlineExceeded, match="stop"):
        call.check()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_ends_when_the_loop_is_gone_is_dropped(caplog):
    future: Future[Answer] = Future()

    async def begun() -> None:
        Ended(asyncio.get_running_loop()).of(future)

    asyncio.run(begun())
    future.set_result(answer(1))
    assert not [record for record in caplog.records if record.name == "concurrent.futures"]  # where callbacks fail
