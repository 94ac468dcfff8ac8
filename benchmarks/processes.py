"""What the processes that serve take: memory, and CPU time, which hardly depends on who else is there."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


def cpu_s(roots: Iterable[int]) -> float:
    """Seconds of these processes and all their descendants, those that have ended among them."""
    stats = _stats()
    fields = [stats[process] for process in _family(roots, stats)]
    return sum(int(one) for each in fields for one in each[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mib(root: int) -> float:
    """Resident memory of a process and all its descendants; shared pages count for each."""
    stats = _stats()
    pages = sum(int(stats[process][21]) for process in _family([root], stats))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def postmaster(url: str) -> list[int]:
    """The process of the PostgreSQL server that `benchmarks.feedback.server` started; none of another."""
    for directory in parse_qs(urlsplit(url).query).get("host", []):
        file = Path(directory) / "data" / "postmaster.pid"
        if file.exists():
            return [int(file.read_text().split()[0])]
    return []


def _stats() -> dict[int, list[str]]:
    """Of every process the fields of Linux's /proc/PID/stat from the third on."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(entry.parent.name)] = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended since
    return found


def _family(roots: Iterable[int], stats: Mapping[int, list[str]]) -> set[int]:
    family, before = set(roots) & stats.keys(), -1
    while len(family) > before:
        before = len(family)
        family |= {process for process, fields in stats.items() if int(fields[1]) in family}
    return family
