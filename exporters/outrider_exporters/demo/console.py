"""What the demo says while it works: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from outrider_exporters.passes.base import Progress

Advance = Callable[[int], None]
PLAIN_SHARE = 4  # lines of progress without a terminal


class Narrator:
    """Numbered steps, progress and tables, on one stream."""

    def __init__(self, stream: TextIO, *, steps: int) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
        self._steps = steps
        self._step = 0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One numbered step and how long it took."""
        self._step += 1
        self._console.print(f"[bold]{self._step}/{self._steps} {title}[/bold]")
        start = time.monotonic()
        yield
        self._console.print(f"    done in {time.monotonic() - start:.1f} s")

    def say(self, text: str) -> None:
        """One line inside a step."""
        self._console.print(f"    {text}")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """A bar with the time left; the yielded function takes how much of ``total`` is done."""
        if not self._console.is_terminal:
            yield self._plain_progress(label, total)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)

    def _plain_progress(self, label: str, total: int) -> Advance:
        said = 0

        def advance(done: int) -> None:
            nonlocal said
            share = done * PLAIN_SHARE // max(total, 1)
            if share > said:
                said = share
                self.say(f"{label}: {done}/{total}")

        return advance

    @contextmanager
    def activity(self) -> Iterator[Callable[[Progress], None]]:
        """A line that follows long work; without a terminal, one line for each of its steps."""
        if not self._console.is_terminal:
            yield self._plain_activity()
            return
        with self._console.status("") as status:
            yield lambda at: status.update(_activity_text(at))

    def _plain_activity(self) -> Callable[[Progress], None]:
        last = ""

        def show(at: Progress) -> None:
            nonlocal last
            if at.step != last:
                last = at.step
                self.say(_activity_text(at))

        return show

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are figures."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for position, column in enumerate(columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)


def _activity_text(at: Progress) -> str:
    count = f" {at.done + 1}/{at.total}" if at.total > 1 else ""
    return f"{at.step}{count}: {at.message}" if at.message else f"{at.step}{count}"
