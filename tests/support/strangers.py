"""Distributions of strangers that have an engine, installed for one test."""

from __future__ import annotations

from pathlib import Path

import pytest


def distribute(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, entry: str) -> None:
    """Install a module with that source, and an entry point such as ``name = module:Class``."""
    site = folder / "site"
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[outrider.engines]\n{entry}\n")
    (site / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(site))
