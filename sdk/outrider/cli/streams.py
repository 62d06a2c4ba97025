"""The standard streams of a command: one may be closed, have no letters for a word, or no reader, or no room."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from outrider_runtimes.errors import OutriderError


def prepare_streams() -> None:
    """What a terminal has no letters for is a question mark on it; what is written to a closed stream is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # else a print to the one would go to the other
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for the process's life
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def silence_stdout() -> None:
    """What waits in its buffer goes nowhere: it cannot be written, and the interpreter would say so at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Standard output that cannot be written, but for a reader that has gone, is an error like any other."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise OutriderError(
            f"standard output cannot be written: {error.strerror}", hint="check the disk, or where it is sent to"
        ) from None
