"""SQL as it is run, for processes that end themselves at a step."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any


def watch_statements(tell: Callable[[str], None]) -> None:
    """Have every connection of this process tell each statement before it is run."""
    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.set_trace_callback(tell)
        return db

    sqlite3.connect = traced  # type: ignore[assignment,unused-ignore]
