"""What sources are tried with: files, a pseudo terminal for a serial port, a program in the place of arecord."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import tty
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from outrider.agent.payload import Payload, Signal
from outrider.agent.sourceconfig import FolderConfig, SerialConfig
from outrider.agent.sources.base import Frame, Source
from outrider.agent.sources.serial import SerialSource
from outrider_runtimes.errors import InputError

QUIET = 400  # ticks without a frame, after which a test gives up: TICK_S each at most


def taken(source: Source, count: int) -> list[tuple[str, Payload | str]]:
    """The next frames, read and done with; an unreadable one is its error."""
    found: list[tuple[str, Payload | str]] = []
    with contextlib.closing(source.frames()) as frames:  # type: ignore[type-var]
        quiet = 0
        for frame in frames:
            quiet = 0 if frame is not None else quiet + 1
            assert quiet < QUIET, f"only {found}"
            if frame is not None:
                found.append(dealt_with(frame))
            if len(found) == count:
                break
    return found


def dealt_with(frame: Frame) -> tuple[str, Payload | str]:
    try:
        return frame.name, frame.read()
    except InputError as error:
        return frame.name, str(error)
    finally:
        frame.done()


def arrays(found: list[tuple[str, Payload | str]]) -> list[np.ndarray]:
    payloads = [payload for _, payload in found]
    assert all(isinstance(payload, Signal) for payload in payloads), payloads
    return [payload.array for payload in payloads if isinstance(payload, Signal)]


def folder(tmp_path: Path, **changes: Any) -> tuple[Path, FolderConfig, Path]:
    inbox = tmp_path / "inbox"
    inbox.mkdir(exist_ok=True)
    options: dict[str, Any] = {"path": inbox, "settle_s": 0.0, "once": True}
    return inbox, FolderConfig(**(options | changes)), tmp_path / "memory.done"


def put(path: Path, data: bytes, modified_s: int) -> None:
    path.write_bytes(data)
    os.utime(path, (modified_s, modified_s))


def npy(value: float) -> bytes:
    file = io.BytesIO()
    np.save(file, np.float32([value]))
    return file.getvalue()


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


@contextlib.contextmanager
def pty_pair() -> Iterator[tuple[int, str]]:
    sensor, port = os.openpty()
    tty.setraw(port)
    try:
        yield sensor, os.ttyname(port)
    finally:
        for end in (sensor, port):
            with contextlib.suppress(OSError):
                os.close(end)


def serial(port: str, **changes: Any) -> SerialSource:
    options: dict[str, Any] = {"port": port, "window": 2}
    return SerialSource(SerialConfig(**(options | changes)))


def play(folder: Path, body: str) -> None:
    program = folder / "arecord"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom array import array\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
