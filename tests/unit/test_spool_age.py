"""How old a waiting record is: by the time that the device was on, because no wall clock can be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.record import Range
from outrider.telemetry.spool import HIGH, LOW, Account, Spool
from outrider.telemetry.spoolfile import Lived
from outrider_runtimes.errors import TelemetryError
from support.telemetry import a_draft

DAY_S = 86_400.0


class Device:
    """A board with a monotonic clock that begins again at each boot."""

    def __init__(self, path: Path, *, max_age_s: float | None = DAY_S) -> None:
        self.path, self.max_age_s = path, max_age_s
        self.boots, self.now_s = 1, 100.0

    def open(self) -> Spool:
        return Spool(self.path, max_age_s=self.max_age_s, clock=lambda: self.now_s, boot=f"boot-{self.boots}")

    def reboot(self, *, uptime_s: float = 20.0) -> None:
        self.boots, self.now_s = self.boots + 1, uptime_s


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "x.sqlite")


def test_what_waited_too_long_is_dropped_whatever_its_class_and_counted(device: Device) -> None:
    with device.open() as spool:
        spool.append([a_draft(1, priority=HIGH), a_draft(2, priority=LOW)])
        device.now_s += DAY_S / 2
        spool.append([a_draft(3)])
        device.now_s += DAY_S / 2
        assert spool.expire() == 0, "a day is not longer than a day"
        device.now_s += 1
        assert spool.expire() == 2
        assert [row.seq for row in spool.peek(9)] == [3]
        device.now_s += DAY_S
        spool.append([a_draft(4)])
        assert [row.seq for row in spool.peek(9)] == [4], "a commit drops them too"
        assert spool.account() == Account(enqueued=4, delivered=0, pending=1, dropped=3, expired=3)


def test_what_is_in_flight_stays_until_it_is_let_go(device: Device) -> None:
    with device.open() as spool:
        spool.append([a_draft(), a_draft()])
        spool.claim(1, after_seq=0, max_bytes=10**6)
        device.now_s += 2 * DAY_S
        assert spool.expire() == 1
        assert [row.seq for row in spool.peek(9)] == [1]
        spool.release([1])
        assert spool.expire() == 1


def test_a_process_that_was_stopped_counts_and_a_board_that_was_off_does_not(device: Device) -> None:
    with device.open() as spool:
        spool.append([a_draft()])
        device.now_s += 0.4 * DAY_S
    device.now_s += 0.4 * DAY_S  # no process, the same boot
    with device.open() as spool:
        assert spool.expire() == 0
    for _ in range(5):  # a year in a drawer between each
        device.reboot()
        device.open().close()
    with device.open() as spool:
        assert spool.expire() == 0
        device.now_s += 0.21 * DAY_S
        assert spool.expire() == 1


def test_after_a_kill_the_time_since_the_last_commit_still_counts_in_the_same_boot(device: Device) -> None:
    spool = device.open()
    spool.append([a_draft()])
    spool._lock.close()  # as a kill -9 does: no clean stop is noted
    spool._db.close()
    device.now_s += DAY_S + 1
    with device.open() as again:
        assert again.expire() == 1


def test_without_a_bound_nothing_expires(tmp_path: Path) -> None:
    device = Device(tmp_path / "x.sqlite", max_age_s=None)
    with device.open() as spool:
        spool.append([a_draft()])
        device.now_s += 10**9
        assert spool.expire() == 0
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(TelemetryError, match="max_age_s"):
            Spool(tmp_path / "y.sqlite", max_age_s=wrong)


def test_a_poisoned_record_is_dropped_in_flight_or_not_and_counted_once(device: Device) -> None:
    with device.open() as spool:
        spool.append([a_draft()] * 3)
        spool.claim(2, after_seq=0, max_bytes=10**6)
        assert spool.set_aside(2)
        assert not spool.set_aside(2)
        assert spool.receive([Range(1, 3)]) == 2
        assert not spool.set_aside(3)
        assert spool.account() == Account(enqueued=3, delivered=2, pending=0, dropped=1, poisoned=1)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-(10**9), 10**12)), max_size=20),
)
def test_the_time_that_was_lived_never_goes_back_and_a_boot_adds_nothing(steps: list[tuple[bool, int]]) -> None:
    lived = Lived(boot="0", monotonic_ms=0, lived_ms=0)
    boots = 0
    for reboot, monotonic_ms in steps:
        boots += reboot
        later = lived.at(str(boots), monotonic_ms)
        assert later.lived_ms >= lived.lived_ms
        if reboot:
            assert later.lived_ms == lived.lived_ms
        else:
            assert later.lived_ms - lived.lived_ms == max(0, monotonic_ms - lived.monotonic_ms)
        lived = later
