"""What the guards of the fine-tuning measured, as small plots over its steps."""

from collections.abc import Mapping
from typing import Any

from accord.evaluation.report.numbers import finite, node, number
from accord.evaluation.report.svg import ALIGNED, BASE, FAINT, MUTED, house_style, inline_svg, new_figure

LABELS = {
    "reward": "Training reward",
    "held_out": "Held-out judge",
    "reference_distance": "Distance to the base model",
    "diversity": "Diversity within a prompt",
    "saturation": "Colour saturation",
    "edge_density": "Edge density",
}


def guard_plots(summary: Mapping[str, Any]) -> dict[str, str]:
    """By label, an inline SVG of each measure's mean over the steps; {} where no guards watched."""
    found = node(summary, "guards", "measures")
    measures = found if isinstance(found, Mapping) else {}
    names = [*(name for name in LABELS if name in measures), *sorted(set(measures) - set(LABELS))]
    plots = {}
    for name in names:
        pairs = [(finite(pair[0]), finite(pair[1])) for pair in measures[name]]
        points = [(step, value) for step, value in pairs if step is not None and value is not None]
        if points:
            label = LABELS.get(name, name.replace("_", " ").capitalize())
            plots[label] = _plot(name, label, points, summary)
    return plots


def _plot(name: str, label: str, points: list[tuple[float, float]], summary: Mapping[str, Any]) -> str:
    """A line at the step at which a guard tripped; a full mark at the snapshot that was kept."""
    tripped = number(summary, "guards", "decision", "step")
    kept = number(summary, "guards", "decision", "best_step")
    stopped = node(summary, "guards", "decision", "tripped") is True
    with house_style():
        figure, axes = new_figure(300, 150, left=44, bottom=24, right=10, top=8)
        if stopped and tripped is not None:
            axes.axvline(tripped, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=BASE, linewidth=1.1, marker="o", markersize=3, zorder=2)
        best = [(step, value) for step, value in points if stopped and step == kept]
        for step, value in best:
            axes.plot([step], [value], color=ALIGNED, marker="o", markersize=7, zorder=3)
        axes.yaxis.grid(True, color=FAINT, linewidth=0.8)
        axes.locator_params(axis="both", nbins=5)
        axes.margins(x=0.04, y=0.15)
        return inline_svg(figure, f"guard-{name}", f"{label} over the steps of fine-tuning.")
