"""The table of benchmarks.engine and benchmarks.serving."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import spread, table


def report(runs: list[dict[str, Any]], ours: str) -> str:
    """One row for each traffic, load and rival; ratios are those of runs with the same arrivals."""
    rows = []
    for traffic, load, rival in dict.fromkeys((r["traffic"], r["load"], r["rival"]) for r in runs):
        same = [r for r in runs if (r["traffic"], r["load"]) == (traffic, load)]
        mine = [r for r in same if r["rival"] == rival]
        best = [r for r in same if r["rival"] == ours]
        faster = [e["images_per_s"] / r["images_per_s"] for e, r in zip(best, mine, strict=True)]
        rows.append(
            [
                traffic,
                load,
                rival,
                spread([r["images_per_s"] for r in mine]),
                spread([r["images_per_s"] / r["ceiling"] for r in mine]),
                "" if rival == ours else spread(faster),
                spread([r["p50_s"] for r in mine]),
                spread([r["p95_s"] for r in mine]),
                sum(r["failed"] for r in mine),
            ]
        )
    headings = ["traffic", "load / ceiling", "", "images/s", "of the ceiling", f"{ours} is faster by"]
    return table([*headings, "p50 s", "p95 s", "failed"], rows)
