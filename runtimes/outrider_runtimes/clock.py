"""Whether this machine's clock can be believed, and which boot this is."""

from __future__ import annotations

import ctypes
import uuid
from pathlib import Path

TIME_ERROR = 5  # what adjtimex answers where nothing keeps the clock


def clock_is_synchronised() -> bool | None:
    """What the kernel says of its clock, whichever daemon keeps it; None where it cannot be asked."""
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != TIME_ERROR


def this_boot(root: Path = Path("/")) -> str:
    """The kernel's id of this boot; where there is none, one for this call alone."""
    try:
        return str(uuid.UUID((root / "proc/sys/kernel/random/boot_id").read_text().strip()))
    except (OSError, ValueError):
        return str(uuid.uuid4())
