"""Who is trying a fresh bundle, and whether a process died over it.

A mark is a file that its process holds a lock on. Its first byte says whether the process is inside a call of the
bundle. It is written without a flush to the disk: it outlives the process, which is its purpose, and not a power cut,
which is no fault of the bundle's.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_OUTSIDE, _INSIDE = b"0", b"1"


class Mark:
    """This process's mark on one bundle, from its making to its release."""

    def __init__(self, folder: Path, digest: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / os.urandom(8).hex()
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, _OUTSIDE + digest.encode())
        except OSError:
            self.release()
            raise

    def inside(self, yes: bool) -> None:
        """Say whether a call of the bundle runs now."""
        if self._descriptor >= 0:
            os.pwrite(self._descriptor, _INSIDE if yes else _OUTSIDE, 0)

    def release(self) -> None:
        """Take it away. A second call does nothing."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def died_inside(folder: Path, digest: str) -> int:
    """How many processes died inside a call of that bundle; what dead processes left is removed.

    What is no file is no mark, whoever put it there.
    """
    died = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):
            died += _left_by_the_dead(path) == _INSIDE + digest.encode()
    return died


def _left_by_the_dead(path: Path) -> bytes:
    """What a mark says whose process is gone, and remove it; nothing for one that is held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = os.read(descriptor, 128)
        path.unlink()
    except BlockingIOError:
        return b""
    finally:
        os.close(descriptor)
    return said
