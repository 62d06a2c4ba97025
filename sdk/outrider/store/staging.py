"""What is being written, and how others see that it is."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path


class Staging:
    """A folder for what is being written, with the list of blobs that must not be swept and a lock on it."""

    def __init__(self, parent: Path, blobs: frozenset[str]) -> None:
        self.folder = parent / secrets.token_hex(8)
        self.folder.mkdir(mode=0o700)
        self._descriptor = -1
        try:
            self._descriptor = os.open(self.folder / "held", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            with os.fdopen(self._descriptor, "wb", closefd=False) as file:
                file.write("\n".join(sorted(blobs)).encode())
        except BaseException:
            self._remove()
            raise

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Remove it."""
        if self.held:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1


def held_by(folder: Path) -> list[str]:
    """The blobs that a living process holds by this staging folder; a dead one's folder is removed."""
    try:
        descriptor = os.open(folder / "held", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        shutil.rmtree(folder, ignore_errors=True)
        return []
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder / "held").read_text().split()
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return []
    finally:
        os.close(descriptor)
