"""What this board runs on, as Linux says it under ``sys/class/power_supply``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outrider_runtimes.heat import number, text


@dataclass(frozen=True, kw_only=True)
class Power:
    """One look.

    Attributes:
        left: what the emptiest of the board's batteries has left, 0.0 to 1.0; None where there is no battery.
        on_battery: whether one of them is being discharged now.
    """

    left: float | None = None
    on_battery: bool = False


def read_power(root: Path = Path("/")) -> Power:
    """Look once. What is not there or cannot be read is unknown, never an error.

    A battery of something that is attached (``scope`` is ``Device``: a mouse) is not the board's.

    Args:
        root: where ``sys`` is.
    """
    left: list[float] = []
    on_battery = False
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if text(supply / "type") != "Battery" or text(supply / "scope") == "Device":
            continue
        on_battery = on_battery or text(supply / "status") == "Discharging"
        percent = number(supply / "capacity")
        if percent is not None and 0 <= percent <= 100:
            left.append(percent / 100.0)
    return Power(left=min(left, default=None), on_battery=on_battery)
