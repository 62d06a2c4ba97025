"""Which of some files were opened, by anyone: the kernel's own account (inotify), by inode, so that links are seen."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

IN_ACCESS, IN_OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")


@contextmanager
def watched(files: Iterable[Path]) -> Iterator[list[Path]]:
    """The list fills, when the block ends, with those that were opened or read within it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    found: list[Path] = []
    try:
        by_watch = {_add(libc, descriptor, file): file for file in files}
        yield found
        found += {by_watch[watch]: None for watch in _events(descriptor)}
    finally:
        os.close(descriptor)


def _add(libc: ctypes.CDLL, descriptor: int, file: Path) -> int:
    watch: int = libc.inotify_add_watch(descriptor, os.fsencode(file), IN_ACCESS | IN_OPEN)
    if watch < 0:
        raise OSError(ctypes.get_errno(), f"inotify_add_watch of {file}")
    return watch


def _events(descriptor: int) -> Iterator[int]:
    while True:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, _, _, size = _EVENT.unpack_from(data, at)
            yield watch
            at += _EVENT.size + size
