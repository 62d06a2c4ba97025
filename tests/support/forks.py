"""A child of ``os.fork`` and what it says."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

CHILD_S = 120.0


def in_child(run: Callable[[], object]) -> str:
    """What ``run`` returns in a forked child, as text, or what it raised; a child that hangs is an AssertionError."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(run()).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}; {getattr(error, 'hint', '')}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], CHILD_S)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert ready, "the child hangs"
        return os.read(reading, 65536).decode()
    finally:
        os.close(reading)
