"""Where a training loop stands, on disk, so that it can be stopped and go on to the same weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from torch import nn

FINGERPRINT_DIGITS = 16


class Checkpoint:
    """One file in a folder. Its name has the fingerprint of all that decides the training's result, so that a file of
    another training, other data or other starting weights is never gone on from."""

    def __init__(self, folder: Path, kind: str, fingerprint: str) -> None:
        self.path = folder / f"{kind}-{fingerprint[:FINGERPRINT_DIGITS]}.pt"

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None. Only tensors and plain values are read: nothing in the file runs.

        Raises:
            ConfigError: the file is damaged.
        """
        import torch

        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ConfigError(
                f"checkpoint {self.path} cannot be read: {error}", hint="remove it to start anew"
            ) from None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file whole; a crash leaves the one from before. Raises ExportError when it cannot be written."""
        import torch

        part: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(descriptor, "wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self.path)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"checkpoint {self.path} cannot be written: {error}") from error
        finally:
            if part is not None:
                with contextlib.suppress(FileNotFoundError):
                    Path(part).unlink()


def fingerprint(words: Iterable[object], arrays: Iterable[Array], network: nn.Module) -> str:
    """The sha256 of what decides a training's result."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"{word!r}\n".encode())
    for array in arrays:
        _add(digest, array)
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}\n".encode())
        _add(digest, tensor.detach().cpu().numpy())
    return digest.hexdigest()


def _add(digest: Any, array: Array) -> None:
    digest.update(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.tobytes())
