"""The house style of the plots, and the way from a matplotlib figure to an inline SVG.

After Tufte: no boxes, no legend where a label can stand at the data, an interval wherever there is one. A
model keeps one colour and one marker in every plot. An SVG takes its colours from the page's CSS variables:
one plot reads well in both themes. Its text stays text, in the page's own sans serif. The same numbers
give the same bytes. Sizes are in the SVG's own pixels: a plot is laid out for a phone, and grows on a desk.
"""

import html
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accord.evaluation.report.numbers import Estimate, percent

# matplotlib wants real colours; each of these stands for a CSS variable until the SVG is written.
INK, MUTED, FAINT, PAPER = "#010101", "#020202", "#030303", "#040404"
BASE, CONTROL, ALIGNED = "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    FAINT: "--faint",
    PAPER: "--paper",
    BASE: "--base",
    CONTROL: "--control",
    ALIGNED: "--aligned",
}

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "accord",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same everywhere
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10.5,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Style:
    """How one model, or one way of scoring, looks in every plot."""

    label: str
    colour: str
    marker: str
    size: float
    hollow: bool = False

    def marks(self) -> dict[str, Any]:
        """Options of `Axes.plot`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": self.size,
            "markerfacecolor": PAPER if self.hollow else self.colour,
            "markeredgecolor": self.colour,
            "markeredgewidth": 1.4 if self.hollow else 0.8,
        }


MODELS = {
    "base": Style("base", BASE, "o", 5.5, hollow=True),
    "control": Style("control", CONTROL, "D", 4.4),
    "aligned": Style("aligned", ALIGNED, "o", 6.5),
}
SCORERS = {
    "clip": Style("CLIP similarity", BASE, "o", 5.5, hollow=True),
    "reward_no_auxiliary": Style("reward, no auxiliary loss", CONTROL, "D", 4.4),
    "reward": Style("reward", ALIGNED, "o", 6.5),
}


def house_style() -> AbstractContextManager[None]:
    """For the time of drawing and writing a figure, matplotlib's settings are ours, whatever they were."""
    return matplotlib.rc_context(_RC)


def new_figure(
    width: float, height: float, *, left: float, bottom: float, right: float, top: float
) -> tuple[Figure, Axes]:
    """A figure in the house style and its only axes.

    The margins are given, not found by a layout engine, so that the panels of a row line up exactly.
    """
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=5, colors=MUTED)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.set_axisbelow(True)
    return figure, axes


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element that scales with its place; its ids are unique on the page."""
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    width, height = 72 * figure.get_size_inches()
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # A style inside an SVG would hold for the whole page, and the page chooses the font.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", body)
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(
        r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body
    )
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"\s*\n\s*", " ", body).replace("<defs> </defs>", "").strip()
    return (
        f'<svg class="plot" viewBox="0 0 {width:.0f} {height:.0f}" style="--width: {width:.0f}" role="img"'
        f' aria-label="{html.escape(description)}">{body}</svg>'
    )


def draw_interval(axes: Axes, at: Estimate, position: float, colour: str, *, horizontal: bool = True) -> None:
    """A thin line behind a marker, from the lower to the upper end; nothing when there is no interval."""
    if at.low is None or at.high is None:
        return
    span, where = (at.low, at.high), (position, position)
    x, y = (span, where) if horizontal else (where, span)
    axes.plot(x, y, color=colour, linewidth=1.5, alpha=0.7, solid_capstyle="butt", zorder=2)


def share_axis(axes: Axes, estimates: Sequence[Estimate], *, vertical: bool, from_zero: bool) -> None:
    """An axis in per cent that holds all estimates and their intervals, with faint lines at round numbers."""
    ends = [end for at in estimates for end in (at.value, at.low, at.high) if end is not None] or [0.0, 1.0]
    low = 0.0 if from_zero else 0.1 * int(10 * max(0.0, min(ends)) + 1e-9)
    high = min(1.0, 0.1 * int(10 * max(ends) + 1 - 1e-9))
    high = max(high, low + 0.1)
    step = 2 if high - low > 0.55 else 1  # tenths
    ticks = [tenth / 10 for tenth in range(0, 11, step) if low - 1e-9 <= tenth / 10 <= high + 1e-9]
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(ticks, labels=[f"{percent(tick)}%" for tick in ticks])
    axis.grid(True, color=FAINT, linewidth=0.8)
    (axes.set_ylim if vertical else axes.set_xlim)(low, high)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Names of rows, the first at the top: row i of n is at n - 1 - i."""
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_yticks(range(len(labels)), labels=list(reversed(labels)), color=INK)
