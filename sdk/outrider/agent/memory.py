"""What an agent keeps on disk for itself: which commands it took, and what they set that a restart must not undo.

Everything is in ``<state>/agent/<device>``, which is readable by its owner alone; each file is replaced as a whole, and
on disk before the write returns.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from outrider.agent.commands import MAX_SEQUENCE, Acknowledgement, Past
from outrider.bundle.files import atomic_file
from outrider.store.state import system_errors
from outrider_runtimes import strictjson
from outrider_runtimes.errors import AgentError, StoreError

FORMAT: Final = 1
MAX_FILE_BYTES: Final = 1024 * 1024
MAX_TAKEN: Final = 16  # that are remembered: a broker sends one again within moments, or not at all
_FIELDS: Final[Mapping[str, type]] = {
    "command": str,
    "device": str,
    "name": str,
    "result": str,
    "reason": str,
    "detail": str,
    "data": dict,
}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One signed command that was taken.

    Attributes:
        sequence, digest: its number, and the sha256 of its text.
        acknowledgement: what it is answered; before it was done, that it was interrupted.
        open: whether it was begun and not ended; found so at a start, the process had died in it.
    """

    sequence: int
    digest: str
    acknowledgement: Acknowledgement
    open: bool


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What commands set, and restarts keep.

    Attributes:
        paused: whether the source is not to be read.
        policy: the fields of the policy that was set; None for the file's.
        over: a digest of the file's policy that it replaces: when the file says something else, the file counts again.
        seeded: the digest of the bundle file that the configuration names, once it was installed: what was installed
            or rolled back after that is not undone by a restart.
    """

    paused: bool = False
    policy: Mapping[str, Any] | None = None
    over: str = ""
    seeded: str = ""


def private_folder(state: Path, device: str) -> Path:
    """``<state>/agent/<device>``, made 0700. Raises StateDirectoryError."""
    folder = state / "agent" / device
    with system_errors(state):
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            each.chmod(0o700)
    return folder


class Instance:
    """The place of the one agent of a device in a state directory; it goes with the process."""

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            AgentError: another process has it; names that.
            StateDirectoryError: the folder cannot be written.
        """
        path = folder / "lock"
        with system_errors(folder):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            self.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise AgentError(f"{path} cannot be locked: {error.strerror}") from None
            raise AgentError(
                f"another agent (process {holder or 'unknown'}) runs as {folder.name} with this state directory",
                hint="stop it, or give this one another device id or state directory",
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give it up. Again is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def past_of(taken: Sequence[Taken]) -> Past:
    """What ``judge`` looks at."""
    return Past(last=max((each.sequence for each in taken), default=0), digests={t.sequence: t.digest for t in taken})


def read_taken(folder: Path) -> tuple[Taken, ...]:
    """The latest commands that were taken, the oldest first.

    Raises:
        StoreError: the file was damaged. No signed command can be taken then: an old one could come again.
    """
    path = folder / "commands.json"
    hint = f"no signed command is taken; move {path} away to begin at sequence 0"
    data = _read(path, hint=hint)
    if data is None:
        return ()
    try:
        return tuple(_taken(each) for each in data["taken"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} was damaged: {error!r}", hint=hint) from None


def write_taken(folder: Path, taken: Sequence[Taken]) -> None:
    """The latest of them are on disk when this returns. Raises StoreError, StateDirectoryError."""
    data = [{**vars(each), "acknowledgement": vars(each.acknowledgement)} for each in taken[-MAX_TAKEN:]]
    _write(folder / "commands.json", {"taken": data})


def _taken(fields: Mapping[str, Any]) -> Taken:
    said = fields["acknowledgement"]
    numbers = (fields["sequence"], said["sequence"])
    sound = (
        all(type(number) is int and 0 < number <= MAX_SEQUENCE for number in numbers)
        and all(isinstance(said[name], kind) for name, kind in _FIELDS.items())
        and isinstance(fields["digest"], str)
        and isinstance(fields["open"], bool)
    )
    if not sound:
        raise ValueError("a command is not as it was written")
    return Taken(
        sequence=fields["sequence"],
        digest=fields["digest"],
        acknowledgement=Acknowledgement(**{name: said[name] for name in (*_FIELDS, "sequence")}),
        open=fields["open"],
    )


def read_standing(folder: Path) -> Standing:
    """What commands set before. Raises StoreError where the file was damaged."""
    path = folder / "standing.json"
    data = _read(path, hint=f"move {path} away: what commands set is forgotten then")
    if data is None:
        return Standing()
    kinds: dict[str, Any] = {"paused": bool, "over": str, "seeded": str, "policy": (dict, type(None))}
    if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        raise StoreError(f"{path} was damaged", hint=f"move {path} away: what commands set is forgotten then")
    return Standing(**{name: data[name] for name in kinds})


def write_standing(folder: Path, standing: Standing) -> None:
    """It is on disk when this returns. Raises StoreError, StateDirectoryError."""
    _write(folder / "standing.json", dict(vars(standing)))


def _read(path: Path, *, hint: str) -> dict[str, Any] | None:
    with system_errors(path.parent):
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None

    def refuse(problem: str) -> StoreError:
        return StoreError(f"{path} was damaged: {problem}", hint=hint)

    data = strictjson.parse(raw, refuse, max_bytes=MAX_FILE_BYTES, max_depth=16)
    if data.get("format") != FORMAT:
        raise refuse(f"expected format {FORMAT}")
    return data


def _write(path: Path, data: Mapping[str, Any]) -> None:
    with system_errors(path.parent), atomic_file(path, mode=0o600) as file:
        file.write(json.dumps({"format": FORMAT, **data}).encode())
