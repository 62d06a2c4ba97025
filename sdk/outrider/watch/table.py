"""The fleet as text: a table for a terminal, and what ``--json`` prints. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from outrider.watch.fleet import Row

# What to sort by -> the key of a row. What is not known comes last; of numbers the highest comes first.
_STATES: Final = {"offline": 0, "stale": 1, "unknown": 2, "online": 3}
SORTS: Final[dict[str, Callable[[Row], Any]]] = {
    "device": lambda row: row.device,
    "state": lambda row: (_STATES[row.state], not row.told.problems, row.device),
    "latency": lambda row: _falling(row.told.p95_ms),
    "offload": lambda row: _falling(row.told.offload_share),
    "temperature": lambda row: _falling(row.told.temperature_c),
    "heard": lambda row: -row.heard_s,
}
HEADINGS: Final = (
    "device",
    "state",
    "model",
    "variant",
    "req/s",
    "p50 ms",
    "p95 ms",
    "offload",
    "degraded",
    "temp",
    "heard",
    "problems",
    "last event",
)
_NUMBERS: Final = frozenset(("req/s", "p50 ms", "p95 ms", "offload", "degraded", "temp", "heard"))
_WIDEST: Final = 40
_RED, _YELLOW, _GREEN, _BOLD, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
_COLOURS: Final = {"online": _GREEN, "stale": _YELLOW, "offline": _RED, "unknown": _YELLOW}


def sort_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows in an order of SORTS."""
    return sorted(sorted(rows, key=lambda row: row.device), key=SORTS[by])


def render(rows: Sequence[Row], *, now_s: float, width: int | None = None, colour: bool = False) -> str:
    """The table as lines.

    Args:
        rows: in the order to show.
        now_s: what ``heard`` is counted from.
        width: of the terminal; lines are cut there. None cuts nothing.
        colour: whether the state has a colour; the word says it too.
    """
    table = [HEADINGS, *(_cells(row, now_s) for row in rows)]
    widths = [max(len(cells[at]) for cells in table) for at in range(len(HEADINGS))]
    lines = []
    for number, cells in enumerate(table):
        padded = [
            cell.rjust(size) if heading in _NUMBERS else cell.ljust(size)
            for cell, size, heading in zip(cells, widths, HEADINGS, strict=True)
        ]
        line = "  ".join(padded).rstrip()[:width]
        if colour:
            line = _coloured(line, padded, None if number == 0 else rows[number - 1])
        lines.append(line)
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One line over the whole fleet."""
    counts = {state: sum(row.state == state for row in rows) for state in ("online", "stale", "offline")}
    troubled = sum(bool(row.told.problems) for row in rows)
    rate = sum(row.told.per_second or 0.0 for row in rows if row.state == "online")
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    return (
        f"{len(rows)} device{'' if len(rows) == 1 else 's'}: {states}; {troubled} with problems; {rate:.1f} answers/s"
    )


def repaint(text: str, *, height: int) -> str:
    """What a terminal needs to show ``text`` in the place of what it showed: no line of the old one is left."""
    lines = text.split("\n")
    if len(lines) > height - 1:
        lines = [*lines[: height - 2], f"... {len(lines) - height + 2} lines more"]
    return "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as ``--json`` and the page have it."""
    fields = asdict(row)
    return {**{key: value for key, value in fields.items() if key != "told"}, **fields["told"]}


def age(seconds: float) -> str:
    """``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    seconds = max(0.0, seconds)
    for limit, unit, size in ((120.0, "s", 1.0), (7200.0, "min", 60.0), (172800.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400.0:.0f} d"


def _cells(row: Row, now_s: float) -> tuple[str, ...]:
    told = row.told
    model = "-" if told.model is None else f"{told.model} {told.version}"
    event = "" if row.event is None else f"{row.event.name} {row.event.detail}".strip()
    return (
        row.device,
        row.state,
        _cut(model),
        _cut(told.variant or "-"),
        _number(told.per_second, "{:.1f}"),
        _number(told.p50_ms, "{:.2f}"),
        _number(told.p95_ms, "{:.2f}"),
        _number(told.offload_share, "{:.1%}"),
        _number(told.degraded_share, "{:.1%}"),
        _number(told.temperature_c, "{:.0f} C"),
        age(now_s - row.heard_s) if row.heard_s else "-",
        ",".join(told.problems) or "-",
        "-" if row.event is None else f"{_cut(event)}, {age(now_s - row.event.at_s)}",
    )


def _coloured(line: str, padded: Sequence[str], row: Row | None) -> str:
    if row is None:
        return f"{_BOLD}{line}{_PLAIN}"
    begin = len(padded[0]) + 2
    end = min(len(line), begin + len(row.state))
    return line if end <= begin else f"{line[:begin]}{_COLOURS[row.state]}{line[begin:end]}{_PLAIN}{line[end:]}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _falling(value: float | None) -> tuple[bool, float]:
    return (value is None, -(value or 0.0))


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
