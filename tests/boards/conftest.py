"""Says at the end how many tests ran on the emulated boards."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each board: its tests ran in an emulator and are not among those that are counted here."""
    for report in [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]:
        for name, value in getattr(report, "user_properties", ()):
            if name == "device tests":
                terminalreporter.write_line(f"{name}: {value}")
