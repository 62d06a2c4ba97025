"""Where the state is, and what the system says when it cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from outrider_runtimes.errors import OutriderError, StateDirectoryError, StoreError
from outrider_runtimes.options import require_kind

CHOOSE_STATE = "pass state= (--state), or set STATE_DIRECTORY or XDG_STATE_HOME to a directory that this user can write"


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def find_state_dir(
    state: str | Path | None = None, environ: Mapping[str, str] = os.environ, *, writing: bool = True
) -> Path:
    """The directory of all state; made (0700) where it is not there.

    The argument, else the first of ``$STATE_DIRECTORY`` (systemd's), else ``$XDG_STATE_HOME/outrider``, else
    ``~/.local/state/outrider``.

    Args:
        writing: whether it must be writable: what is installed and has proven itself is served from a read-only disk.

    Raises:
        StateDirectoryError: it cannot be made, read or written; names it.
        ConfigError: it is no path.
    """
    require_kind("state", state, (str, Path, type(None)), "the path of a folder, or None")
    path = _state_path(state, environ)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise StateDirectoryError(f"state directory {path} cannot be made: {reason}", hint=CHOOSE_STATE) from None
    if not os.access(path, os.R_OK | os.X_OK | (os.W_OK if writing else 0)):
        how = "written" if writing else "read"
        raise StateDirectoryError(f"state directory {path} cannot be {how} by this user", hint=CHOOSE_STATE)
    return path


def _state_path(state: str | Path | None, environ: Mapping[str, str]) -> Path:
    if state is not None:
        return Path(state).absolute()
    systemd = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if systemd:
        return Path(systemd).absolute()
    xdg = environ.get("XDG_STATE_HOME", "")
    if xdg.startswith("/"):
        return Path(xdg) / "outrider"
    home = environ.get("HOME", "") or os.path.expanduser("~")  # noqa: PTH111 - Path.home() ignores ``environ``
    if not home.startswith("/"):
        raise StateDirectoryError("there is no home directory for the state", hint=CHOOSE_STATE)
    return Path(home) / ".local" / "state" / "outrider"


@contextmanager
def system_errors(root: Path) -> Iterator[None]:
    """What the system refuses, as errors that name the file and the way out."""
    try:
        yield
    except OutriderError:
        raise
    except OSError as error:
        where = error.filename or root
        if error.errno in NO_SPACE:
            raise StoreError(
                f"no space is left for {where}: {error.strerror}",
                hint=f"free space on the disk of {root}; what was installed is untouched",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
            raise StateDirectoryError(f"state directory {root}: {where}: {error.strerror}", hint=CHOOSE_STATE) from None
        raise StoreError(f"store {root}: {where}: {error.strerror}") from None
