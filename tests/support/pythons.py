"""The other Pythons of this machine, each with an environment that has what a device has."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from boards.selection import TESTS
from outrider_exporters.rehearse.userland import find_cache, made_once

PINS = TESTS / "boards/native.txt"
ROOTS = [str(TESTS.parent / folder) for folder in ("sdk", "runtimes")]


def find_python(version: str) -> Path | None:
    """The interpreter ``3.10``: on the PATH, or one that pyenv keeps; None where there is none that starts."""
    on_path = shutil.which(f"python{version}")
    kept = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [Path(on_path)] if on_path else []
    found += sorted(kept.glob(f"{version}.*/bin/python{version}"))
    return next((path for path in found if _starts(path)), None)


def device_python(version: str, interpreter: Path) -> Path:
    """The Python of an environment with the device's packages, made once and kept."""
    pins = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    folder = find_cache(None) / f"device-python-{version}-{pins}"

    def fill(staging: Path) -> None:
        subprocess.run([interpreter, "-m", "venv", "--without-pip", staging / "venv"], check=True)
        install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--target", staging / "site", "--requirement", PINS], check=True)

    made_once(folder, fill)
    return folder


def venv_of(pins: Path, *, over: str = "") -> Path:
    """The Python of a virtual environment with what a file pins and nothing else, made once and kept.

    ``over``: a requirement that is installed after that by itself, as pip does it, on top of the same files.
    """
    digest = hashlib.sha256(f"{sys.version}{over}".encode() + pins.read_bytes()).hexdigest()[:12]
    folder = find_cache(None) / f"venv-{pins.stem}-{digest}"

    def fill(staging: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", staging / "venv"], check=True)
        install = [sys.executable, "-m", "pip", "--python", staging / "venv/bin/python", "install", "--quiet"]
        subprocess.run([*install, "--disable-pip-version-check", "--requirement", pins], check=True)
        if over:
            subprocess.run([*install, "--disable-pip-version-check", "--no-deps", over], check=True)

    made_once(folder, fill)
    return folder / "venv/bin/python"


def environment_of(folder: Path) -> dict[str, str]:
    """That of a process of ``device_python``: its packages and this tree, and nothing of this session's Python."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PYTHONPATH": ":".join([*ROOTS, str(folder / "site")]), "OMP_NUM_THREADS": "1"}


def _starts(path: Path) -> bool:
    return subprocess.run([path, "-c", "import ensurepip, sqlite3, ssl"], capture_output=True).returncode == 0
