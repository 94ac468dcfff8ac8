"""CPU time of the processes that serve: what it is does not depend on who else uses the machine."""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


def cpu_s(roots: Iterable[int]) -> float:
    """Seconds of these processes and all their descendants, those that have ended among them."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended since
        parents[int(entry.parent.name)] = int(fields[1])
        ticks[int(entry.parent.name)] = sum(int(field) for field in fields[11:15])
    wanted, before = set(roots) & ticks.keys(), -1
    while len(wanted) > before:
        before = len(wanted)
        wanted |= {process for process, parent in parents.items() if parent in wanted}
    return sum(ticks[process] for process in wanted) / os.sysconf("SC_CLK_TCK")


def postmaster(url: str) -> list[int]:
    """The process of the PostgreSQL server that `benchmarks.feedback.server` started; none of another."""
    for directory in parse_qs(urlsplit(url).query).get("host", []):
        file = Path(directory) / "data" / "postmaster.pid"
        if file.exists():
            return [int(file.read_text().split()[0])]
    return []
