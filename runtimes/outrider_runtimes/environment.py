"""The environment of a Python child of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def child_environment(path: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The parent's environment, with a module search path that finds what the parent finds and not what lies in cwd."""
    folders = [str(Path(folder).absolute()) for folder in path if folder]
    return {**environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
