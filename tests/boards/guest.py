"""A pytest plugin for the emulated Python: a test's children are emulated too, and the outcome is written down."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# The kernel cannot start the emulated interpreter by itself; this script can.
sys.executable = os.environ["OUTRIDER_GUEST_PYTHON"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests ended how, and the names of those that failed, as JSON."""
    stats = terminalreporter.stats
    counts = Counter({outcome: len(stats.get(outcome, ())) for outcome in ("passed", "failed", "error", "skipped")})
    failed = [report.nodeid for outcome in ("failed", "error") for report in stats.get(outcome, ())]
    Path(os.environ["OUTRIDER_GUEST_REPORT"]).write_text(json.dumps({"counts": counts, "failed": failed}))
