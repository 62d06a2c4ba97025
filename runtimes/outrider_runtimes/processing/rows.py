"""Rows of bytes of any length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider_runtimes.tensors import Array


def padded(rows: Sequence[bytes | memoryview], length: int) -> Array:
    """uint8 [N, length]: each row's bytes, then zeros. No row is longer than ``length``."""
    made = np.zeros((len(rows), length), np.uint8)
    for number, row in enumerate(rows):
        made[number, : len(row)] = np.frombuffer(row, np.uint8)
    return made
