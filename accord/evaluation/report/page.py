"""From a summary, a gallery and facts about the run to one HTML page.

Here pictures and tables are put together; how they look is the template's and the style sheet's business.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from accord.errors import ArtifactError
from accord.evaluation.report import plots, tables
from accord.evaluation.report.gallery import BestOfCard, Gallery, PairCard, Served
from accord.evaluation.report.guards import guard_plots
from accord.evaluation.report.numbers import DASH, finite, fixed, node, number, percent
from accord.evaluation.report.svg import MODELS, SCORERS
from accord.evaluation.report.words import QUESTIONS, SPLITS
from accord.evaluation.verdict import compute_verdict

_HERE = Path(__file__).parent
_PIXELATED_BELOW_PX = 160  # smaller images are enlarged with their pixels kept sharp
_SERVED_BEGIN, _SERVED_END = "<!-- served: begin -->", "<!-- served: end -->"
_NAMED_RUN_INFO = ("title", "name", "recipe", "command")


@dataclass(frozen=True)
class Picture:
    """An image as the template needs it: its bytes inside its address, so that the page is complete."""

    uri: str
    width: int
    height: int
    alt: str
    reward: str
    reward_percent: float
    success: bool | None

    @property
    def pixelated(self) -> bool:
        return max(self.width, self.height) < _PIXELATED_BELOW_PX


def build_report(summary: Mapping[str, Any], gallery: Gallery, run_info: Mapping[str, Any]) -> str:
    """The report as one HTML string: no script, no request to the network, the same bytes for the same input.

    Args:
        summary: as written to summary.json. What is missing or null shows as an em dash, or its section is
            left out.
        gallery: pictures; empty lists leave their sections out.
        run_info: `title`, `name`, `recipe` (its YAML text) and `command` (which repeats the run) have their
            places; every other entry is a line of what made the report, in the given order.
    """
    level = number(summary, "protocol", "confidence_level")
    return _template().render(
        title=str(run_info.get("title") or "What the feedback changed"),
        name=str(run_info.get("name") or ""),
        verdict=compute_verdict(summary),
        headlines=tables.headlines(summary),
        pair_groups=_pair_groups(gallery.pairs),
        gallery_note=gallery.note,
        strips=[_strip(card) for card in gallery.best_of],
        served=Markup(render_served(gallery.served)),
        plots=_plots(summary),
        splits=SPLITS,
        questions=QUESTIONS,
        models={model: style.label for model, style in MODELS.items()},
        scorers={scorer: style.label for scorer, style in SCORERS.items()},
        success=tables.success(summary),
        fidelity=tables.fidelity(summary),
        frontier_gain=tables.frontier_gain(summary),
        votes=tables.votes(summary),
        best_of_sizes=tables.best_of_sizes(summary),
        best_of=tables.best_of(summary),
        reward=tables.reward(summary),
        calibration_note=tables.calibration_note(summary),
        feedback=tables.feedback(summary),
        raters=tables.raters(summary),
        raters_agree=tables.raters_agree(summary),
        labels_are_true=tables.labels_are_true(summary),
        agreement=tables.agreement(summary),
        guards_said=str(node(summary, "guards", "decision", "reason") or ""),
        protocol={
            key: fixed(number(summary, "protocol", key), 0)
            for key in ("raters", "quorum", "images_per_prompt")
        },
        dash=DASH,
        intervals="intervals" if level is None else f"{percent(level)}% intervals",
        provenance={
            k: str(v) for k, v in run_info.items() if k not in _NAMED_RUN_INFO and v not in (None, "")
        },
        digests=tables.leaves(summary.get("digests")),
        stages=tables.stages(summary),
        recipe=str(run_info.get("recipe") or ""),
        command=str(run_info.get("command") or ""),
        style=Markup((_HERE / "style.css").read_text("utf-8")),
    )


def render_served(served: Served | None) -> str:
    """The section on what was served over gRPC; empty when nothing was."""
    if served is None:
        return ""
    return _template("served.html.j2").render(
        strips=[_strip(card) for card in served.cards], note=served.note, command=served.command
    )


def replace_served(html: str, served: Served | None) -> str:
    """A report with its section on what was served replaced by this one; the same again changes nothing.

    Raises:
        ArtifactError: the page has no place for it.
    """
    before, begin, rest = html.partition(_SERVED_BEGIN)
    _, end, after = rest.partition(_SERVED_END)
    if not begin or not end:
        raise ArtifactError("the report has no place for what was served: make it anew with `accord report`")
    return before + begin + render_served(served) + end + after


@cache
def _template(name: str = "template.html.j2") -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _plots(summary: Mapping[str, Any]) -> dict[str, Any]:
    """SVGs, safe to insert as they are: every text in them is ours or a number."""
    metrics = ("auc", "auc_within_category", "pairwise_accuracy")
    return {
        "success": {split: Markup(plots.success_panel(summary, split)) for split in SPLITS},
        "frontier": Markup(plots.frontier(summary)),
        "best_of": Markup(plots.best_of_curve(summary)),
        "ranking": {metric: Markup(plots.ranking(summary, metric)) for metric in metrics},
        "calibration": {split: Markup(plots.calibration(summary, split)) for split in SPLITS},
        "votes": {question: Markup(plots.votes(summary, question)) for question in QUESTIONS},
        "guards": {label: Markup(svg) for label, svg in guard_plots(summary).items()},
    }


def _picture(png: bytes, alt: str, reward: float | None, success: bool | None) -> Picture:
    value = finite(reward)
    # A PNG's width and height are big-endian in bytes 16 to 24: its header chunk is always the first.
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    verdict = "" if success is None else ", fits the prompt" if success else ", does not fit the prompt"
    return Picture(
        uri="data:image/png;base64," + base64.b64encode(png).decode("ascii"),
        width=width,
        height=height,
        alt=alt + verdict,
        reward=fixed(value),
        reward_percent=100 * min(1.0, max(0.0, value or 0.0)),
        success=success,
    )


def _pair_groups(pairs: Sequence[PairCard]) -> list[dict[str, Any]]:
    """Pairs by split in the usual order, unknown splits last, with a count of what changed."""
    splits = [*SPLITS, *dict.fromkeys(card.split for card in pairs if card.split not in SPLITS)]
    groups = []
    for split in splits:
        cards = [card for card in pairs if card.split == split]
        if not cards:
            continue
        shown = [
            {
                "prompt": card.prompt,
                "seed": card.seed,
                "base": _picture(
                    card.base_png, f"Base model, “{card.prompt}”", card.base_reward, card.base_success
                ),
                "aligned": _picture(
                    card.aligned_png,
                    f"Aligned model, “{card.prompt}”",
                    card.aligned_reward,
                    card.aligned_success,
                ),
            }
            for card in cards
        ]
        label = SPLITS.get(split, split.replace("_", " "))
        groups.append({"label": label, "cards": shown, "changes": _changes(cards)})
    return groups


def _changes(cards: Sequence[PairCard]) -> str:
    judged = [
        (c.base_success, c.aligned_success) for c in cards if None not in (c.base_success, c.aligned_success)
    ]
    if not judged:
        return ""
    gained, lost = judged.count((False, True)), judged.count((True, False))
    right, wrong = judged.count((True, True)), judged.count((False, False))
    return f"{gained} became right, {lost} became wrong, {right} stayed right, {wrong} stayed wrong."


def _strip(card: BestOfCard) -> dict[str, Any]:
    who = card.model.capitalize()
    images = [
        _picture(png, f"{who} model, “{card.prompt}”, rank {rank}", reward, success)
        for rank, (png, reward, success) in enumerate(card.ranked, start=1)
    ]
    return {"prompt": card.prompt, "model": card.model, "images": images}
