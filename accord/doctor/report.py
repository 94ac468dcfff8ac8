"""What the doctor found: memory a stage, disk, time and what is missing; as a table, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class StageMemory:
    """A stage's processes, each with its parts in bytes, against what one place (a machine, a GPU) has."""

    stage: str
    place: str
    """host or GPU."""
    processes: int
    """At once in that place."""
    parts: Mapping[str, int]
    available: int | None
    """Bytes; None where it is not known."""

    @property
    def total(self) -> int:
        return self.processes * sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.total <= self.available


@dataclass(frozen=True)
class StageTime:
    """Work of a stage on all of its processes."""

    stage: str
    work: str
    """For people: 27528 images of 25 steps."""
    flops: float
    seconds: float | None
    """None where no speed is known."""


@dataclass(frozen=True)
class Report:
    """All that was found. `problems` stop a run; `notes` do not."""

    recipe: str
    model: str
    memory: tuple[StageMemory, ...]
    disk: Mapping[str, int]
    disk_free: int
    times: tuple[StageTime, ...]
    speed: str
    """How the times were estimated."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def disk_total(self) -> int:
        return sum(self.disk.values())

    @property
    def fits(self) -> bool:
        """Nothing is missing, and nothing is known not to fit."""
        rooms = [stage.fits for stage in self.memory] + [self.disk_total <= self.disk_free]
        return not self.problems and False not in rooms

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes, times in seconds."""
        data = asdict(self)
        for entry, stage in zip(data["memory"], self.memory, strict=True):
            entry |= {"total": stage.total, "fits": stage.fits}
        return {**data, "disk_total": self.disk_total, "fits": self.fits}


def show(report: Report, console: Console) -> None:
    """Prints it, widest table first."""
    console.print(f"{report.recipe}: {report.model}", highlight=False)
    if report.memory:
        console.print(_memory_table(report))
    if report.disk:
        console.print(_disk_table(report))
    if report.times:
        console.print(_time_table(report))
        console.print(f"Times are {report.speed}.", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]Note:[/] {_plain(note)}", highlight=False)
    for problem in report.problems:
        console.print(f"[bold red]Problem:[/] {_plain(problem)}", highlight=False)
    verdict = "[bold green]It fits." if report.fits else "[bold red]It does not fit, or something is missing."
    console.print(verdict)


def in_words(size: float) -> str:
    """Bytes for people: 13.8 GB."""
    for unit, scale in _UNITS:
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"


def _memory_table(report: Report) -> Table:
    table = Table("Memory", "Of one process", "Total", "There is", "", box=None, pad_edge=False)
    for stage in report.memory:
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in stage.parts.items() if size)
        where = f"{stage.stage} ({stage.processes} on {stage.place})"
        there = "unknown" if stage.available is None else in_words(stage.available)
        table.add_row(where, parts, in_words(stage.total), there, _mark(stage.fits))
    return table


def _disk_table(report: Report) -> Table:
    table = Table("Disk", "", box=None, pad_edge=False)
    for name, size in report.disk.items():
        table.add_row(name, in_words(size))
    fits = report.disk_total <= report.disk_free
    table.add_row(
        "total", f"{in_words(report.disk_total)} of {in_words(report.disk_free)} free {_mark(fits)}"
    )
    return table


def _time_table(report: Report) -> Table:
    table = Table("Time", "Work", "About", box=None, pad_edge=False)
    for stage in report.times:
        about = "unknown" if stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.stage, stage.work, about)
    return table


def _mark(fits: bool | None) -> str:
    return {True: "[green]fits[/]", False: "[bold red]too little[/]", None: "[yellow]?[/]"}[fits]


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
