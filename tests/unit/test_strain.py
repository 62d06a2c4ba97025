"""What strains a board, read from made-up trees, in a thread of its own that ends when nobody asks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.hybrid import strain as strain_module
from outrider.hybrid.strain import LINGER_S, OLDEST_S, BoardWatch
from outrider.policy import UNKNOWN, Strain
from outrider_runtimes.power import Power, read_power
from support import threads
from support.clocks import ManualClock
from support.runners import until
from support.trees import tree

SUPPLY = "sys/class/power_supply"
ZONE = "sys/class/thermal/thermal_zone0/temp"


def battery(name: str, **files: str) -> dict[str, str]:
    return {f"{SUPPLY}/{name}/{key}": value + "\n" for key, value in {"type": "Battery", **files}.items()}


# --- power


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Power()),
        ({f"{SUPPLY}/AC/type": "Mains", f"{SUPPLY}/AC/online": "1"}, Power()),
        (battery("BAT0", status="Discharging", capacity="15"), Power(left=0.15, on_battery=True)),
        (battery("BAT0", status="Charging", capacity="15"), Power(left=0.15)),
        (battery("BAT0", status="Full", capacity="100"), Power(left=1.0)),
        (battery("BAT0", status="Discharging"), Power(on_battery=True)),
        (battery("BAT0", status="Discharging", capacity="full"), Power(on_battery=True)),
        (battery("BAT0", status="Discharging", capacity="250"), Power(on_battery=True)),
        (battery("mouse", status="Discharging", capacity="3", scope="Device"), Power()),
        (
            battery("BAT0", status="Charging", capacity="90") | battery("BAT1", status="Discharging", capacity="40"),
            Power(left=0.4, on_battery=True),
        ),
    ],
)
def test_what_a_board_runs_on(tmp_path: Path, files: dict[str, str], expected: Power) -> None:
    assert read_power(tree(tmp_path, files)) == expected


def test_this_machine_can_be_asked() -> None:
    left = read_power().left
    assert left is None or 0.0 <= left <= 1.0


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=20), st.text(st.characters(codec="ascii"), max_size=20))
def test_whatever_the_files_say_is_no_error(tmp_path_factory, capacity: str, status: str) -> None:
    root = tree(tmp_path_factory.mktemp("root"), battery("BAT0", status=status, capacity=capacity))
    left = read_power(root).left
    assert left is None or 0.0 <= left <= 1.0


# --- the watch


def test_heat_and_power_are_one_look(tmp_path: Path) -> None:
    files = {ZONE: "81000", "sys/devices/platform/soc/soc:firmware/get_throttled": "50005"}
    watch = BoardWatch(
        tree(tmp_path, files | battery("BAT0", status="Discharging", capacity="12")), clock=ManualClock()
    )
    watch.look()
    assert watch.latest(1000.0) == Strain(celsius=81.0, throttled=True, undervolted=True, battery=0.12)
    watch.close()


def test_a_battery_that_is_charged_is_no_reason(tmp_path: Path) -> None:
    watch = BoardWatch(tree(tmp_path, battery("BAT0", status="Charging", capacity="12")), clock=ManualClock())
    watch.look()
    assert watch.latest(1000.0).battery is None
    watch.close()


def test_before_the_first_look_and_long_after_the_last_nothing_is_known(tmp_path: Path) -> None:
    clock = ManualClock()
    watch = BoardWatch(tree(tmp_path, {ZONE: "81000"}), clock=clock)
    watch.close()  # no thread: the looks are the test's
    assert watch.latest(clock.now_s) is UNKNOWN
    watch.look()
    assert watch.latest(clock.now_s + OLDEST_S).celsius == 81.0
    assert watch.latest(clock.now_s + OLDEST_S + 0.1) is UNKNOWN


def test_the_first_call_starts_one_thread_and_it_ends_when_nobody_asks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(strain_module, "INTERVAL_S", 0.001)
    clock, watches = ManualClock(), threads.since_now("outrider-strain")
    watch = BoardWatch(tree(tmp_path, {ZONE: "81000"}), clock=clock)
    assert not watches()
    for _ in range(20):
        watch.latest(clock.now_s)
    assert len(watches()) == 1
    until(lambda: watch.latest(clock.now_s) is not UNKNOWN)
    clock.now_s += LINGER_S + 1.0
    until(lambda: not watches())

    def looks_again() -> bool:
        watch.latest(clock.now_s)  # a thread that has left the list of threads may be alive for a moment still
        return len(watches()) == 1

    until(looks_again)
    assert looks_again()
    watch.close()
    until(lambda: not watches())
    watch.latest(clock.now_s)
    assert not watches()


def test_a_look_that_hangs_holds_no_call(tmp_path: Path) -> None:
    """A sensor that never answers: here a pipe that nobody writes to."""
    import os

    tree(tmp_path, {ZONE: ""})
    (tmp_path / ZONE).unlink()
    os.mkfifo(tmp_path / ZONE)
    watch = BoardWatch(tmp_path)
    for _ in range(100):
        assert watch.latest(time.monotonic()) is UNKNOWN
    watch.close()
    descriptor = os.open(tmp_path / ZONE, os.O_RDWR)  # lets the thread go
    os.write(descriptor, b"50000\n")
    os.close(descriptor)
