"""The memory of a server with many threads: what is freed goes back to the system."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # as <malloc.h> has it
LARGE_BYTES = 1 << 20


def give_back_large_blocks() -> bool:
    """Have this process return blocks of 1 MiB or more to the system as soon as they are freed; whether it can be had.

    Else glibc raises its bound for that to the largest block that was freed, up to 32 MiB, and every few threads keep
    twice as much of their own: a server whose requests have 7 MiB each keeps hundreds of MiB that nobody uses. A block
    costs some page faults more, about 0.1 ms per MiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none, and needs none
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
