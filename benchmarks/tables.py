"""Numbers for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three digits."""
    lines = [list(headings), ["---"] * len(headings), *[[_cell(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the least and the most, of the repeats."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def describe(device: str) -> str:
    return ", ".join(f"{name}: {value}" for name, value in machine(device).items())


def write_json(path: Path | None, device: str, settings: dict[str, Any], results: Any) -> None:
    """Writes all numbers where `--json` says; nothing without it."""
    if path is not None:
        content = {"machine": machine(device), "settings": settings, "results": results}
        path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
