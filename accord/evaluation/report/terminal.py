"""The results as a table for the terminal: what `make demo` prints at the end."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from accord.evaluation.report.numbers import DASH, Estimate, estimate, fixed, interval, number, percent
from accord.evaluation.report.tables import best_of_sizes
from accord.evaluation.report.words import SPLITS

MODELS = ("base", "control", "aligned")


def results_table(summary: Mapping[str, Any]) -> Table:
    """Success by split, votes won minus lost, best of n and the Frechet distance, one column a model.

    Shares are in per cent with their intervals; the votes compare the aligned model with the base.
    """
    table = Table(
        title="Results", title_justify="left", caption_justify="left", header_style="bold", pad_edge=False
    )
    table.caption = "Per cent, with intervals. Net wins: sets of images won minus lost against the base."
    table.add_column("", no_wrap=True)
    for model in MODELS:
        table.add_column(model, justify="right")
    for split, label in SPLITS.items():
        cells = [_share(estimate(summary, "success", model, split, "overall")) for model in MODELS]
        table.add_row(f"success, {label.lower()}", *cells, end_section=split == list(SPLITS)[-1])
    for question in ("alignment", "fidelity"):
        for split, label in SPLITS.items():
            net = _share(estimate(summary, "net_win", question, split), signed=True)
            if net != DASH:
                table.add_row(f"net wins in {question}, {label.lower()}", "", "", net)
    table.add_section()
    for n in best_of_sizes(summary):
        cells = [_share(estimate(summary, "best_of", model, n)) for model in MODELS]
        table.add_row("one image, best-of prompts" if n == 1 else f"best of {n} by reward", *cells)
    table.add_section()
    table.add_row("Fréchet distance (lower is better)", *(_frechet(summary, model) for model in MODELS))
    return table


def _share(at: Estimate, *, signed: bool = False) -> str:
    if at.value is None:
        return DASH
    span = interval(at)
    return percent(at.value, signed=signed) + (f" ({span})" if span else "")


def _frechet(summary: Mapping[str, Any], model: str) -> str:
    return fixed(number(summary, "fidelity", model, "frechet"), 1)
