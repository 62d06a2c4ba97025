"""How hot this board is, and whether it holds itself back for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLDEST_C, HOTTEST_C = -40.0, 150.0  # sensors that are not wired say something beyond
VCGENCMD_S = 2.0
# The Raspberry Pi firmware's bits of what holds now; those 16 higher say what held at some time since it booted.
UNDERVOLTED, CAPPED, THROTTLED, SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
CPU_COOLING = ("cpufreq", "thermal-cpufreq", "processor", "cpu")


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One look at a board.

    Attributes:
        celsius: of the hottest zone; None where there is no sensor.
        throttled: whether the processor is slowed down for its heat or its supply; None where nothing says so.
        undervolted: whether the supply is too weak now, as far as the firmware says.
        ceiling: the highest frequency that is allowed now as a share of the processor's own, 0 to 1; None if unknown.
            For people to read, not a sign of heat: an operator's own limit looks the same and never goes, a Raspberry
            Pi's firmware slows down without lowering it, and where the kernel lowers it ``throttled`` says so.
    """

    celsius: float | None = None
    throttled: bool | None = None
    undervolted: bool = False
    ceiling: float | None = None


def read_heat(root: Path = Path("/")) -> Heat:
    """Look once. What is not there or cannot be read is unknown, never an error.

    Args:
        root: where ``sys`` is, and ``usr/bin/vcgencmd`` on an older Raspberry Pi, which takes some milliseconds.
    """
    firmware = _firmware(root)
    says = [] if firmware is None else [bool(firmware & (CAPPED | THROTTLED | SOFT_LIMIT))]
    says += [state > 0 for state in _cooling(root)]
    return Heat(
        celsius=max(_zones(root), default=None),
        throttled=any(says) if says else None,
        undervolted=bool((firmware or 0) & UNDERVOLTED),
        ceiling=min(_ceilings(root), default=None),
    )


def _zones(root: Path) -> Iterator[float]:
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        thousandths = number(zone / "temp")
        if thousandths is not None and COLDEST_C < thousandths / 1000 < HOTTEST_C:
            yield thousandths / 1000


def _cooling(root: Path) -> Iterator[int]:
    """How far each means of slowing the processor down is used; a fan slows nothing down."""
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        state = number(device / "cur_state")
        if state is not None and text(device / "type").lower().startswith(CPU_COOLING):
            yield state


def _ceilings(root: Path) -> Iterator[float]:
    for policy in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*")):
        allowed, own = number(policy / "scaling_max_freq"), number(policy / "cpuinfo_max_freq")
        if allowed and own:
            yield min(1.0, allowed / own)


def _firmware(root: Path) -> int | None:
    """The Raspberry Pi firmware's word: by the kernel where it has a file for it, else by its own tool."""
    for path in sorted(root.glob("sys/devices/platform/soc/*firmware/get_throttled")):
        return _hexadecimal(text(path))
    tool = root / "usr/bin/vcgencmd"
    if not tool.is_file():
        return None
    try:
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=VCGENCMD_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return _hexadecimal(done.stdout.strip().removeprefix("throttled="))


def _hexadecimal(word: str) -> int | None:
    try:
        return int(word, 16)
    except ValueError:
        return None


def number(path: Path) -> int | None:
    """The whole number in a file of the kernel's; None where there is none."""
    try:
        return int(text(path))
    except ValueError:
        return None


def text(path: Path) -> str:
    """What a file of the kernel's says; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # a sensor that is asleep answers with EAGAIN, one that is gone with ENODATA
        return ""
