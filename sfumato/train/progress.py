"""What a run prints: lines and tables as they are, progress with speed and ETA (plain lines now and then in a file)."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress as rich_progress
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from sfumato.data.store import Progress


class _Steady(Console):
    """A console whose output may stand on a full disk, or whose reader may have gone: no training ends for that."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError:
            del self._buffer[:]


def _literal(kind: type[Console], *, stderr: bool) -> Console:
    """A console that prints text as it is: `[v2]` or `:cat:` in the name of a file is no markup. All printing goes
    through one of these."""
    return kind(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


console = _literal(_Steady, stderr=True)
"""Messages along the way, on stderr."""
answers = _literal(Console, stderr=False)
"""What was asked for, such as the table of `sfumato plan`, on stdout."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """Print a table on stdout; no cell is cut: where the terminal is narrow, headings and the longest cells are broken
    into lines."""
    texts = [tuple(map(str, row)) for row in rows]
    longest = [max(map(cell_len, cells)) for cells in zip(*texts, strict=True)] or [0] * len(columns)
    whole = [max(cells, cell_len(column)) for column, cells in zip(columns, longest, strict=True)]
    narrow = 1 + sum(width + 3 for width in whole) > answers.width
    table, least = Table(), 1
    for column, cells, width in zip(columns, longest, whole, strict=True):
        if narrow:
            width = max(cells, *map(cell_len, column.split()))
        broken = cells == max(longest)
        least += 3 + (min(width, NARROWEST) if broken else width)
        table.add_column(Text(textwrap.fill(column, width)), overflow="fold", no_wrap=not broken)
    for row in texts:
        table.add_row(*map(Text, row))
    # What is wider even so is left to the terminal, which breaks the lines: a narrower table would lose letters.
    shown = answers.render(table, answers.options.update(width=max(answers.width, least)))
    answers.print(Segments(shown), soft_wrap=False, crop=False)


NARROWEST = 12
"""Letters per line that the longest cells of a table keep."""


class Bar:
    """The progress of one job."""

    def __init__(self, title: str, total: int, start: int = 0, *, quiet: bool = False) -> None:
        self.title, self.total, self.start, self.done = title, total, start, start
        self.began = self.printed = time.monotonic()
        self.note = ""
        self.bar: rich_progress.Progress | None = None
        self.quiet = quiet
        if console.is_terminal and not quiet:
            self.bar = rich_progress.Progress(
                _column("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
                TimeElapsedColumn(), _column("left"), TimeRemainingColumn(), _column("{task.fields[note]}"),
                console=console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(title, total=total, completed=start, note="")

    def speed(self) -> float:
        """Units per second since the start."""
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def to(self, done: int, note: str = "") -> None:
        """Show that `done` of `total` is done."""
        self.done, self.note = done, note
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        elif not self.quiet and time.monotonic() - self.printed > 15:
            self.printed = time.monotonic()
            left = (self.total - done) / max(self.speed(), 1e-9)
            console.print(
                f"{self.title} {done}/{self.total}  {self.speed():.2f}/s  {_duration(left)} left  {note}".rstrip()
            )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _column(template: str) -> TextColumn:
    return TextColumn(template, markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """An `advance(done, total)` for jobs that learn their size as they go."""
    bar: list[Bar] = []

    def advance(done: int, total: int) -> None:
        if not bar or bar[-1].total != total:  # the next part of the job
            for old in bar[-1:]:
                old.close()
            bar.append(Bar(title, total, quiet=quiet))
        bar[-1].to(done)

    try:
        yield advance
    finally:
        for last in bar[-1:]:
            last.close()
