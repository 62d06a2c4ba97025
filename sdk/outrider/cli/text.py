"""How the commands print what people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns, two spaces apart; no trailing blanks."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def bytes_text(size_bytes: int) -> str:
    """``35,012`` -> ``35.0 kB``."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = size_bytes / 1000
    for unit in ("kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def threads_text(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def batches_text(measured: Mapping[str, Any] | None) -> str:
    """``off: ...`` or ``up to 16 rows a call when served, 8.6 times the rows/s``, and the rows/s of every point."""
    from outrider.admit.curve import BatchCurve, BatchPlan, plan_batches

    curve = None if measured is None else BatchCurve.from_dict(measured)
    plan = plan_batches(curve)
    points = ", ".join(f"{p.rows}: {p.rows_per_s:.0f}/s" for p in curve.points) if curve else ""
    if isinstance(plan, BatchPlan):
        return f"up to {plan.rows} rows a call when served, {plan.gain:.1f} times the rows/s ({points})"
    return f"off when served: {plan}" + (f" ({points})" if points else "")


def tensor_text(spec: Mapping[str, Any]) -> str:
    """``image: float32 [N, 1, 8, 8]``, from a tensor of an interface's JSON."""
    letters = spec.get("axes") or "?" * len(spec["shape"])
    sizes = [letter if size is None else str(size) for letter, size in zip(letters, spec["shape"], strict=True)]
    return f"{spec['name']}: {spec['dtype']} [{', '.join(sizes)}]"


def shown(text: str) -> str:
    """The text with what would move the cursor or change the terminal spelled out: names come from strangers' files."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
