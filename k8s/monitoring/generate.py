"""`make dashboards`: writes components/monitoring/ from rules.py and dashboards.py."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from k8s.monitoring import dashboards, rules
from k8s.monitoring.grafana import to_json

FOLDER = Path(__file__).parents[1] / "components" / "monitoring"
_HEAD = "# Made by k8s/monitoring/generate.py: change rules.py, and say `make dashboards`.\n"


def files() -> dict[str, str]:
    """File name in components/monitoring/ -> content."""
    groups = rules.groups()
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "accord"},
        "spec": {"groups": groups},
    }
    made = {
        "prometheusrule.yaml": _HEAD + _yaml(resource),
        "prometheus-rules.yaml": _HEAD
        + _yaml({"groups": groups}),  # the same, for a Prometheus without the operator
    }
    for dashboard in dashboards.ALL:
        text = json.dumps(to_json(dashboard), indent=1, ensure_ascii=False)
        made[f"dashboards/accord-{dashboard.name}.json"] = text + "\n"
    return made


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True)


def main() -> None:
    """Writes what has changed."""
    for name, text in files().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(FOLDER.parents[2])}")


if __name__ == "__main__":
    main()
