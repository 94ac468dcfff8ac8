"""Progress on the driver's terminal, one line a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


class Bar:
    """A bar that knows how much is done."""

    def __init__(self, progress: Progress, task: TaskID, total: int) -> None:
        self._progress, self._task, self.total = progress, task, total

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)


class Bars:
    """Bars below one another."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add(self, title: str, total: int, unit: str) -> Bar:
        task = self._progress.add_task(title, total=total, note="", unit=unit)
        return Bar(self._progress, task, total)


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars that stay on the terminal as lines when they are full; where there is no terminal, lines at the
    end.
    """
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield Bars(progress)


@contextmanager
def bar(title: str, total: int, unit: str) -> Iterator[Bar]:
    """One bar."""
    with bars() as several:
        yield several.add(title, total, unit)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False, soft_wrap=True)
