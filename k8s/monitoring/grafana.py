"""Panels and dashboards, and Grafana's form of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
_WIDTH, _HEIGHT = 8, 7


@dataclass(frozen=True)
class Panel:
    """A graph. `queries` are (PromQL, legend); `bound` draws a line."""

    title: str
    queries: list[tuple[str, str]]
    unit: str = "short"
    about: str = ""
    bound: float | None = None


@dataclass(frozen=True)
class Dashboard:
    """`rows` are (heading, panels)."""

    name: str
    title: str
    rows: list[tuple[str, list[Panel]]] = field(default_factory=list)

    @property
    def queries(self) -> list[str]:
        return [query for _, panels in self.rows for panel in panels for query, _ in panel.queries]


def to_json(dashboard: Dashboard) -> Json:
    """Grafana's form. Panels are laid out three in a line below their heading."""
    panels: list[Json] = []
    y = 0
    for heading, row in dashboard.rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
            }
        )
        y += 1
        for number, panel in enumerate(row):
            x = (number % 3) * _WIDTH
            if number and x == 0:
                y += _HEIGHT
            panels.append(_panel(panel, len(panels) + 1, x, y))
        y += _HEIGHT
    return {
        "uid": f"accord-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["accord"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> Json:
    source = {"type": "prometheus", "uid": "${source}"}
    limits: list[Json] = [{"color": "green", "value": None}]
    style: Json = {"lineWidth": 2, "fillOpacity": 8, "showPoints": "never", "spanNulls": True}
    if panel.bound is not None:
        limits.append({"color": "red", "value": panel.bound})
        style["thresholdsStyle"] = {"mode": "line"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "custom": style,
                "thresholds": {"mode": "absolute", "steps": limits},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }
