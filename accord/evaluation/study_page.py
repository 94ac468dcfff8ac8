"""A study (study.py) as a page: tables in Markdown and plots as SVG files, made from its numbers alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from accord.evaluation.study import compare_arms

GAINS, TRADE = "study-gains.svg", "study-trade.svg"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "accord",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": False,
}
_INK, _SOFT, _ACCENT = "#222222", "#b8b8b8", "#1f5fa8"
_SHARES = (
    ("gain.all", "gain, points"),
    ("gain.seen", "seen"),
    ("gain.unseen_combination", "unseen combinations"),
    ("gain.unseen_object", "unseen object"),
)
_CATEGORIES = (
    ("gain.all.count", "count"),
    ("gain.all.colour", "colour"),
    ("gain.all.background", "background"),
    ("gain.all.combination", "combination"),
)
_COST = (
    ("ratio.frechet", "Fréchet distance"),
    ("ratio.readable", "readable"),
    ("ratio.diversity", "diversity"),
)


def study_page(study: Mapping[str, Any], changes: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, str]]:
    """The Markdown page, and the content of its pictures by file name.

    Args:
        study: what `build_study` returns.
        changes: each arm's changes of the recipe.
    """
    arms = list(study)
    seeds = max(study[arm]["gain.all"]["n"] for arm in arms)
    parts = [
        f"Means over {seeds} seeds with 95% intervals (Student's t). Gains are success of the fine-tuned "
        "model minus the base's, in points, each model at its own best guidance, on prompts on which no "
        "guidance was chosen.",
        _table("arm", _SHARES, study, lambda cell: _number(cell, 100, 1, signed=True)),
        "By category:",
        _table("arm", _CATEGORIES, study, lambda cell: _number(cell, 100, 1, signed=True)),
        "What it costs, as a ratio to the base:",
        _table("arm", _COST, study, lambda cell: _number(cell, 1, 2)),
        "Raters' votes between sets of four, aligned against base (shares of sets), and success above the "
        "base at equal guidance and at equal Fréchet distance:",
        _table("arm", _VOTES, study, lambda cell: _number(cell, 100, 1, signed=True)),
        "The best of all candidates by reward, and how many candidates the aligned model needs for the "
        "base's success with all of them (median over seeds):",
        _table(
            "arm", _BEST_OF, study, lambda cell: _number(cell, 100, 1), {"best_of.candidates": _candidates}
        ),
        "Each model's best guidance and its share of readable images:",
        _table("arm", _MODELS, study, lambda cell: _number(cell, 1, 2)),
        "The reward, on unseen combinations and objects:",
        _table("arm", _REWARD, study, lambda cell: _number(cell, 1, 3)),
        f"Each arm against {arms[0]}, paired by seed (gain, points):",
        _paired(study, arms),
        "What each arm changes of the recipe:",
        "\n".join(f"- **{arm}**: {_code(changes.get(arm, ()))}" for arm in arms),
    ]
    with matplotlib.rc_context(_STYLE):
        pictures = {GAINS: _gains(study), TRADE: _trade(study)}
    return "\n\n".join(parts) + "\n", pictures


_VOTES = (
    ("votes.alignment.net", "net alignment win"),
    ("votes.fidelity.wins", "fidelity wins"),
    ("votes.fidelity.losses", "losses"),
    ("gain.at_equal_guidance", "at equal guidance"),
    ("gain.at_equal_frechet", "at equal distance"),
)
_BEST_OF = (
    ("best_of.base", "base, %"),
    ("best_of.aligned", "aligned, %"),
    ("best_of.gain", "difference, points"),
    ("best_of.candidates", "candidates for the base's"),
)
_MODELS = (
    ("success.base", "base: success"),
    ("readable.base", "readable"),
    ("guidance.base", "guidance"),
    ("success.aligned", "aligned: success"),
    ("readable.aligned", "readable"),
    ("guidance.aligned", "guidance"),
)
_REWARD = (
    ("reward.auc", "AUC within categories"),
    ("clip.auc", "CLIP's"),
    ("reward.auc_over_clip", "above CLIP"),
    ("reward.auc_over_no_auxiliary", "above no auxiliary loss"),
    ("reward.pairwise", "pairwise accuracy"),
    ("reward.ece", "calibration error"),
)


def _table(
    first: str,
    columns: Sequence[tuple[str, str]],
    study: Mapping[str, Any],
    show: Any,
    other: Mapping[str, Any] | None = None,
) -> str:
    lines = [_row([first, *(title for _, title in columns)]), _row(["---", *["---:"] * len(columns)])]
    for arm, cells in study.items():
        lines.append(_row([arm, *((other or {}).get(name, show)(cells[name]) for name, _ in columns)]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(cell: Mapping[str, Any], scale: float, digits: int, *, signed: bool = False) -> str:
    """ "+12.3 (+8.0 to +16.6)", or "–" where there is nothing."""
    if cell["value"] is None:
        return "–"
    sign = "+" if signed else ""
    texts = [
        f"{scale * cell[key]:{sign}.{digits}f}".replace("-", "−")
        for key in ("value", "low", "high")
        if cell[key] is not None
    ]
    return texts[0] if len(texts) < 3 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _candidates(cell: Mapping[str, Any]) -> str:
    if not cell["n"]:
        return "–"
    return f"> {cell['most']}" if cell["value"] is None else f"{cell['value']:.1f}"


def _paired(study: Mapping[str, Any], arms: Sequence[str]) -> str:
    lines = [_row(["arm", f"minus {arms[0]}"]), _row(["---", "---:"])]
    for arm in arms[1:]:
        difference = compare_arms(study, arm, arms[0], "gain.all").as_dict()
        cell = {key: value if value == value else None for key, value in difference.items()}
        lines.append(_row([arm, _number(cell, 100, 1, signed=True)]))
    return "\n".join(lines)


def _code(changes: Sequence[str]) -> str:
    return ", ".join(f"`{change}`" for change in changes) or "nothing"


def _gains(study: Mapping[str, Any]) -> str:
    """A row an arm: each seed a dot, the mean with its interval."""
    arms = [arm for arm in study if study[arm]["gain.all"]["value"] is not None][::-1]
    figure = Figure(figsize=(7.2, 0.42 * len(arms) + 1.0), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        cell = study[arm]["gain.all"]
        seeds = [100 * value for value in cell["seeds"].values() if value is not None]
        axes.plot(seeds, [row] * len(seeds), "o", color=_SOFT, markersize=4, zorder=1)
        if cell["low"] is not None:
            axes.plot([100 * cell["low"], 100 * cell["high"]], [row, row], color=_ACCENT, zorder=2)
        axes.plot(100 * cell["value"], row, "o", color=_ACCENT, markersize=7, zorder=3)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlabel("gain in success, points (each model at its best guidance)")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    return _svg(figure)


def _trade(study: Mapping[str, Any]) -> str:
    """Gain against the price in Fréchet distance. Arms are numbered: their points may lie close together."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.axvline(1.2, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    names = []
    for number, (arm, cells) in enumerate(study.items(), start=1):
        x, y = cells["ratio.frechet"], cells["gain.all"]
        if x["value"] is None or y["value"] is None:
            continue
        names.append(f"{number}  {arm}")
        axes.plot(x["value"], 100 * y["value"], "o", color=_ACCENT, markersize=13)
        if x["low"] is not None and y["low"] is not None:
            axes.plot([x["low"], x["high"]], [100 * y["value"]] * 2, color=_SOFT, zorder=0)
            axes.plot([x["value"]] * 2, [100 * y["low"], 100 * y["high"]], color=_SOFT, zorder=0)
        place = (x["value"], 100 * y["value"])
        axes.annotate(str(number), place, color="white", fontsize=9, ha="center", va="center")
    axes.text(1.03, 1.0, "\n".join(names), transform=axes.transAxes, va="top", fontsize=10, linespacing=1.7)
    axes.set_xlabel("Fréchet distance, as a ratio to the base's (dashed: the paper's price, 1.2)")
    axes.set_ylabel("gain, points")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()
