"""Draws progress, tables and errors on a terminal; in a log file, plain lines."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

EVERY_SECONDS = 20.0
"""How often a stage writes a line where nothing can be redrawn, such as a log file."""


class Display:
    """`Progress` on a console. A context manager: the bars live while it is open.

    Args:
        console: Where to draw; standard error keeps standard output free for results.
        stages: How many stages the command has, to say which one is under way; 0 does not say.
    """

    def __init__(self, console: Console, stages: int = 0) -> None:
        self.console = console
        self.live = console.is_terminal
        self._stages, self._begun = stages, 0
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> _Bar:
        """Begins a bar of `total` units."""
        self._begun += 1
        task = self._bars.add_task(escape(name), total=total, unit=unit, note="")
        return _Bar(self, task, name, total, unit)

    def say(self, text: str) -> None:
        """Prints one line that stays."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table that stays."""
        print_table(self.console, title, columns, rows)


class _Bar:
    """One stage on the display."""

    def __init__(self, display: Display, task: TaskID, name: str, total: float | None, unit: str) -> None:
        self._display, self._task, self._name, self._total, self._unit = display, task, name, total, unit
        self._done, self._note, self._start = 0, "", time.monotonic()
        self._spoke = self._start

    def __enter__(self) -> Self:
        if not self._display.live:
            total = f" ({self._total:,.0f} {self._unit})" if self._total else ""
            self._display.say(f"{self._name}{total} ...")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        bars, seconds = self._display._bars, time.monotonic() - self._start
        if kind is None:
            bars.update(self._task, total=max(self._done, 1), completed=max(self._done, 1))
        bars.stop_task(self._task)
        if not self._display.live and kind is None:
            self._display.say(f"{self._name} took {seconds:.1f} s{self._said()}")

    def advance(self, steps: int = 1) -> None:
        """`steps` more units are done."""
        self._done += steps
        self._display._bars.advance(self._task, steps)
        if not self._display.live and time.monotonic() - self._spoke > EVERY_SECONDS:
            self._spoke = time.monotonic()
            self._display.say(f"{self._name} {self._done:,}{self._of()}{self._said()}{self._left()}")

    def note(self, text: str) -> None:
        """A short fact beside the bar."""
        self._note = text
        self._display._bars.update(self._task, note=escape(text))

    def _of(self) -> str:
        return f" of {self._total:,.0f} {self._unit}" if self._total else f" {self._unit}"

    def _said(self) -> str:
        return f", {self._note}" if self._note else ""

    def _left(self) -> str:
        if not self._total or not self._done:
            return ""
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        return f", about {left:.0f} s left"


UNCUT = 1000
"""Characters of a line where nothing ends it: in a file, or read by another program."""


def print_table(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table, cut to a terminal's width alone: what is written to a file or read by a program is whole."""
    table = make_table(title, columns, rows)
    if console.is_terminal or os.environ.get("COLUMNS"):
        console.print(table)
        return
    width, console.width = console.width, UNCUT
    console.print(table)
    console.width = width


def make_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose columns of numbers stand to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows if row[number]]
        numeric = bool(cells) and all(cell.strip()[:1].isdigit() or cell.strip()[:1] in "-+." for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*[escape(cell) for cell in row])
    return table
