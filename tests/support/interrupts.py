"""Exceptions out of signal handlers: one at a given point of a call at which Python would let a handler run.

Handlers run in the main thread where a Python function begins and where a call into C returns; a profile function sees
exactly these points, and may raise there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt(BaseException):
    """As KeyboardInterrupt, and nobody else's."""


def interrupted(call: Callable[[], Any], at: int, kind: type[BaseException] = Interrupt) -> bool:
    """Make a call that is interrupted at its ``at``-th point; False where it has fewer."""
    left = at

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        # Until Python 3.13 logging itself keeps the lock that it has when it is interrupted before its ``try``.
        if event in ("call", "c_return") and frame.f_globals.get("__name__") != "logging":
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise kind

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except kind:
        return True
    finally:
        sys.setprofile(before)
    return left <= 0
