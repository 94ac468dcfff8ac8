"""The plots of the report: each a function from a summary to an inline SVG, or "" when nothing was measured.

The axes span what is worth comparing; panels that stand side by side share them.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from accord.evaluation.report.numbers import Estimate, estimate, finite, fixed, node, number, percent
from accord.evaluation.report.svg import (
    ALIGNED,
    BASE,
    FAINT,
    INK,
    MODELS,
    MUTED,
    PAPER,
    SCORERS,
    Style,
    draw_interval,
    house_style,
    inline_svg,
    label_rows,
    new_figure,
    share_axis,
)
from accord.evaluation.report.words import CATEGORIES, SPLITS


def success_panel(summary: Mapping[str, Any], split: str) -> str:
    """Success by category on one split: one row a category, one mark a model."""
    everywhere = {
        (model, at_split, category): estimate(summary, "success", model, at_split, category)
        for model in MODELS
        for at_split in SPLITS
        for category in CATEGORIES
    }
    if all(at.value is None for (_, at_split, _), at in everywhere.items() if at_split == split):
        return ""
    offsets = {"base": 0.21, "control": 0.0, "aligned": -0.21}
    with house_style():
        figure, axes = new_figure(300, 232, left=84, bottom=24, right=16, top=6)
        for row, category in enumerate(reversed(CATEGORIES)):
            for model, style in MODELS.items():
                at, y = everywhere[model, split, category], row + offsets[model]
                if at.value is not None:
                    draw_interval(axes, at, y, style.colour)
                    axes.plot([at.value], [y], linestyle="none", zorder=3, **style.marks())
        axes.axhline(len(CATEGORIES) - 1.5, color=FAINT, linewidth=0.8)
        label_rows(axes, list(CATEGORIES.values()))
        share_axis(axes, list(everywhere.values()), vertical=False, from_zero=True)
        return inline_svg(
            figure, f"success-{split}", f"Success by category on {SPLITS[split].lower()}, each model."
        )


def frontier(summary: Mapping[str, Any]) -> str:
    """Success against Fréchet distance: a curve for each model, a mark for each guidance scale."""
    found = node(summary, "frontier")
    curves: dict[str, list[tuple[float, float, Estimate]]] = {}
    for row in found if isinstance(found, list | tuple) else []:
        scale, distance, at = number(row, "guidance"), number(row, "frechet"), estimate(row, "success")
        model = str(node(row, "model"))
        if model in MODELS and scale is not None and distance is not None and at.value is not None:
            curves.setdefault(model, []).append((scale, distance, at))
    if not curves:
        return ""
    with house_style():
        figure, axes = new_figure(360, 300, left=40, bottom=44, right=14, top=20)
        for model, style in MODELS.items():
            curve = sorted(curves.get(model, []), key=lambda point: point[0])
            for _, distance, at in curve:
                draw_interval(axes, at, distance, style.colour, horizontal=False)
            distances, shares = [point[1] for point in curve], [point[2].value or 0.0 for point in curve]
            axes.plot(distances, shares, linewidth=1.3, zorder=3, **style.marks())
            chosen = number(summary, "guidance", model)
            for scale, distance, at in curve:
                is_chosen = chosen is not None and abs(scale - chosen) < 1e-9
                _label_scale(axes, scale, distance, at.value or 0.0, style, is_chosen=is_chosen)
        share_axis(
            axes, [at for curve in curves.values() for _, _, at in curve], vertical=True, from_zero=False
        )
        axes.margins(x=0.1)
        axes.set_xlabel("Fréchet distance to real images (left is better)")
        _name_vertical_axis(axes, "success (up is better)")
        return inline_svg(
            figure, "frontier", "Success against Fréchet distance at each guidance scale, each model."
        )


def _label_scale(axes: Axes, scale: float, x: float, y: float, style: Style, *, is_chosen: bool) -> None:
    if is_chosen:
        ring = {
            "marker": "o",
            "markersize": style.size + 7,
            "markerfacecolor": "none",
            "markeredgewidth": 1.0,
        }
        axes.plot([x], [y], zorder=4, **{**style.marks(), **ring})
    axes.annotate(
        f"{scale:g}",
        (x, y),
        xytext=(7, -11),
        textcoords="offset points",
        fontsize=9,
        color=style.colour,
        weight="bold" if is_chosen else "normal",
    )


def _name_vertical_axis(axes: Axes, name: str) -> None:
    """Above the axis and level, where it can be read without turning one's head."""
    axes.annotate(
        name,
        (0, 1),
        xycoords="axes fraction",
        xytext=(-34, 8),
        textcoords="offset points",
        color=MUTED,
        va="bottom",
    )


def best_of_curve(summary: Mapping[str, Any]) -> str:
    """Success of the highest-reward image of n; dotted, what a perfect reward would reach."""
    curves: dict[str, list[tuple[int, Estimate]]] = {}
    for model in MODELS:
        found = node(summary, "best_of", model)
        sizes = sorted(int(n) for n in found if str(n).isdigit()) if isinstance(found, Mapping) else []
        curve = [(n, estimate(found, n)) for n in sizes]
        if curve := [(n, at) for n, at in curve if at.value is not None]:
            curves[model] = curve
    if not curves:
        return ""
    # n grows by factors: one step of the axis for each factor, whatever it is.
    steps = {n: step for step, n in enumerate(sorted({n for curve in curves.values() for n, _ in curve}))}
    nudge = {"base": -0.02, "control": 0.0, "aligned": 0.02}
    shown = [at for curve in curves.values() for _, at in curve]
    with house_style():
        figure, axes = new_figure(360, 300, left=40, bottom=30, right=70, top=20)
        for model, curve in curves.items():
            style, x = MODELS[model], [steps[n] + nudge[model] for n, _ in curve]
            for position, (_, at) in zip(x, curve, strict=True):
                draw_interval(axes, at, position, style.colour, horizontal=False)
            axes.plot(x, [at.value or 0.0 for _, at in curve], linewidth=1.3, zorder=3, **style.marks())
            ideal = [number(summary, "best_of", model, n, "perfect") for n, _ in curve]
            if None not in ideal and len(ideal) > 1:
                axes.plot(
                    x,
                    [value or 0.0 for value in ideal],
                    color=style.colour,
                    linewidth=1.1,
                    linestyle=(0, (1, 2.2)),
                )
                shown += [Estimate(value) for value in ideal]
        _label_ends(axes, [(curve[-1][1].value or 0.0, MODELS[model]) for model, curve in curves.items()])
        share_axis(axes, shown, vertical=True, from_zero=False)
        axes.set_xticks(range(len(steps)), labels=["one image" if n == 1 else f"best of {n}" for n in steps])
        axes.set_xlim(-0.3, max(len(steps) - 1, 0.5) + 0.06)
        _name_vertical_axis(axes, "success of the delivered image")
        return inline_svg(figure, "best-of", "Success of the highest-reward image of n, each model.")


def _label_ends(axes: Axes, ends: list[tuple[float, Style]], gap: float = 0.04) -> None:
    """Name each curve at its right end, pushed apart where two ends meet."""
    height = -1.0
    for value, style in sorted(ends, key=lambda end: end[0]):
        height = max(value, height + gap)
        axes.annotate(
            style.label,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, -3.5),
            textcoords="offset points",
            color=style.colour,
            annotation_clip=False,
        )


def ranking(summary: Mapping[str, Any], metric: str) -> str:
    """How well each score ranks good images above bad ones, one row a split; 0.5 is guessing."""
    cells = {
        (scorer, split): estimate(summary, scorer, split, metric) for scorer in SCORERS for split in SPLITS
    }
    if all(at.value is None for at in cells.values()):
        return ""
    ends = [end for at in cells.values() for end in (at.value, at.low) if end is not None]
    offsets = {"clip": 0.2, "reward_no_auxiliary": 0.0, "reward": -0.2}
    with house_style():
        figure, axes = new_figure(300, 156, left=128, bottom=24, right=16, top=6)
        for row, split in enumerate(reversed(SPLITS)):
            for scorer, style in SCORERS.items():
                at, y = cells[scorer, split], row + offsets[scorer]
                if at.value is not None:
                    draw_interval(axes, at, y, style.colour)
                    axes.plot([at.value], [y], linestyle="none", zorder=3, **style.marks())
        lowest = min(0.5, 0.1 * int(10 * min(ends)))
        ticks = [tenth / 10 for tenth in range(11) if lowest - 1e-9 <= tenth / 10]
        axes.set_xticks(ticks, labels=[fixed(tick, 1) for tick in ticks])
        axes.xaxis.grid(True, color=FAINT, linewidth=0.8)
        axes.axvline(0.5, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlim(lowest - 0.01, 1.01)
        label_rows(axes, list(SPLITS.values()))
        return inline_svg(figure, f"ranking-{metric}", f"{metric.replace('_', ' ')} of each score, by split.")


def calibration(summary: Mapping[str, Any], split: str) -> str:
    """The share judged good against the predicted reward; a mark's area is its bin's share of the images."""
    drawn = {scorer: bins for scorer in SCORERS if (bins := _bins(summary, scorer, split))}
    if not drawn:
        return ""
    with house_style():
        figure, axes = new_figure(300, 268, left=44, bottom=42, right=16, top=8)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, zorder=1)
        for scorer, bins in drawn.items():
            predicted, observed = [at[0] for at in bins], [at[1] for at in bins]
            total = sum(count for _, _, count in bins)
            areas = [10 + 260 * count / total for _, _, count in bins]
            colour = SCORERS[scorer].colour
            axes.plot(predicted, observed, color=colour, linewidth=1.1, zorder=2)
            axes.scatter(predicted, observed, s=areas, color=colour, alpha=0.8, linewidths=0, zorder=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
            axis.grid(True, color=FAINT, linewidth=0.8)
        axes.set_xlim(-0.04, 1.04)
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel("predicted reward")
        axes.set_ylabel("share judged good")
        where = SPLITS[split].lower()
        return inline_svg(
            figure, f"calibration-{split}", f"Share judged good against predicted reward on {where}."
        )


def _bins(summary: Mapping[str, Any], scorer: str, split: str) -> list[tuple[float, float, float]]:
    """Reliability bins as (predicted, observed, count) for those that hold images."""
    found = node(summary, scorer, split, "reliability")
    bins = []
    for row in found if isinstance(found, list | tuple) else []:
        predicted, observed, count = (finite(node(row, key)) for key in ("predicted", "observed", "n"))
        if predicted is not None and observed is not None and count:
            bins.append((predicted, observed, count))
    return bins


def votes(summary: Mapping[str, Any], question: str) -> str:
    """Sets of images won, tied and lost by the aligned model, as shares, one row a split."""
    rows: dict[str, list[float]] = {}
    for split in SPLITS:
        counts = [
            number(summary, "net_win", question, split, part) or 0.0 for part in ("wins", "ties", "losses")
        ]
        if sum(counts):
            rows[split] = [count / sum(counts) for count in counts]
    if not rows:
        return ""
    parts = (("won", ALIGNED, PAPER), ("tied", FAINT, INK), ("lost", BASE, PAPER))
    with house_style():
        figure, axes = new_figure(360, 10 + 38 * len(rows), left=128, bottom=4, right=4, top=6)
        for row, shares in enumerate(reversed(rows.values())):
            start = 0.0
            for share, (name, colour, ink) in zip(shares, parts, strict=True):
                axes.barh(row, share, left=start, height=0.62, color=colour, linewidth=0)
                if share >= 0.08:
                    text = f"{percent(share)} {name}" if share >= 0.22 else percent(share)
                    axes.text(
                        start + share / 2, row - 0.02, text, ha="center", va="center", fontsize=9.5, color=ink
                    )
                start += share
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        label_rows(axes, [SPLITS[split] for split in rows])
        return inline_svg(
            figure, f"votes-{question}", f"Votes on {question}: sets won, tied and lost, by split."
        )
