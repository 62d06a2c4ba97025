"""Strangers' engines, looked at from outside: importing one may be what kills a process, so a child does it first."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from outrider_runtimes.engines import strange_names
from outrider_runtimes.environment import child_environment

IMPORT_S = 60.0
REFUSED = 3  # the exit code that says: this ended as it should, with a reason
WHEEL = "its wheel is made for another CPU or system: install an older version, or the board vendor's wheel"
_IMPORT = """
from outrider_runtimes.engines import strange_engine
from outrider_runtimes.errors import NoEngine
try:
    strange_engine(sys.argv[1])
except NoEngine as error:
    print(f"{error}; {error.hint}")
    sys.exit(REFUSED)
print("sound")
"""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a child that looked at an engine said last, ``refused`` where that is a reason; or else cause and cure."""

    said: str = ""
    refused: bool = False
    cause: str = ""
    cure: str = ""


def ask_child(script: str, name: str) -> Heard:
    """Run Python in a child, with ``name`` as its argument and ``sys`` and ``REFUSED`` in scope."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; REFUSED = {REFUSED}\n{script}", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_S,
            cwd="/",
            env=child_environment(sys.path, os.environ),
        )
    except subprocess.TimeoutExpired:
        cause = f"importing it did not end within {IMPORT_S:g} s"
        return Heard(cause=cause, cure="pip install --force-reinstall it")
    said = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode not in (0, REFUSED) or not said[0]:
        return Heard(cause=f"importing it kills the process (exit code {done.returncode})", cure=WHEEL)
    return Heard(said=said[0], refused=done.returncode == REFUSED)


def broken_strangers() -> dict[str, tuple[str, str]]:
    """Cause and cure by the name of each entry point that cannot be imported, or gives what is no engine."""
    broken = {}
    for name in strange_names():
        heard = ask_child(_IMPORT, name)
        if heard.cause:
            broken[name] = (heard.cause, heard.cure)
        elif heard.refused:
            cause, _, cure = heard.said.rpartition("; ")
            broken[name] = (cause, cure)
    return broken
