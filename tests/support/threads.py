"""Threads that a test's own objects started, apart from those that earlier tests left to end in their own time."""

from __future__ import annotations

import threading
from collections.abc import Callable


def since_now(name: str) -> Callable[[], list[threading.Thread]]:
    """Asked later: the threads of that name that started after this call and still run."""
    before = set(threading.enumerate())
    return lambda: [thread for thread in threading.enumerate() if thread.name == name and thread not in before]
