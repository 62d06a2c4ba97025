"""Options that several commands have, each told in one place."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust``, as ``outrider.load`` takes it."""
    parser.add_argument("--trust", type=Path, help="a .pub file or a folder of them (default: OUTRIDER_TRUST)")


def add_state(parser: argparse.ArgumentParser) -> None:
    """``--state``, as ``outrider.load`` takes it."""
    parser.add_argument("--state", type=Path, help="the state directory (default: the user's)")
