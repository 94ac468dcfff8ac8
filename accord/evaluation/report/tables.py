"""The rows of the report's tables, and the headline numbers above them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accord.evaluation.report.numbers import (
    DASH,
    Estimate,
    duration,
    estimate,
    finite,
    fixed,
    interval,
    node,
    number,
    percent,
    points,
)
from accord.evaluation.report.svg import MODELS, SCORERS
from accord.evaluation.report.words import CATEGORIES, QUESTIONS, SPLITS

TUNED = ("control", "aligned")
_RANKING = ("auc", "auc_within_category", "pairwise_accuracy", "ece")


@dataclass(frozen=True)
class Cell:
    """A number of a table and, beside it, its interval; `best` marks the best of its group."""

    text: str
    span: str = ""
    best: bool = False


@dataclass(frozen=True)
class Headline:
    """A number before and after, as large as it matters. `model` is whose the second number is."""

    label: str
    before: str
    after: str
    note: str
    model: str = "aligned"


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, its cells, and the model or the score whose mark stands before the name."""

    label: str
    cells: Sequence[Cell]
    mark: str = ""
    is_total: bool = False


@dataclass(frozen=True)
class Group:
    """Rows under a common name."""

    label: str
    rows: Sequence[Row]


def headlines(summary: Mapping[str, Any]) -> list[Headline]:
    """Success before and after by split, best of n on the base, Fréchet distance; only what was measured."""
    lines = []
    for split, label in SPLITS.items():
        before, after = (
            estimate(summary, "success", model, split, "overall") for model in ("base", "aligned")
        )
        if before.value is not None or after.value is not None:
            gain = points(estimate(summary, "gain", "aligned", split, "overall"))
            lines.append(Headline(label, _with_sign(before), _with_sign(after), gain))
    sizes = best_of_sizes(summary)
    if len(sizes) > 1:
        one, many = (estimate(summary, "best_of", "base", n) for n in (sizes[0], sizes[-1]))
        note = "kept by reward" + (f" ({interval(many)})" if interval(many) else "")
        if many.value is not None:
            lines.append(
                Headline(f"Base, best of {sizes[-1]}", _with_sign(one), _with_sign(many), note, "base")
            )
    before, after = (estimate(summary, "fidelity", model, "frechet") for model in ("base", "aligned"))
    if before.value is not None or after.value is not None:
        digits = 0 if max(before.value or 0.0, after.value or 0.0) >= 100 else 1
        note = "to real images; lower is better"
        lines.append(
            Headline("Fréchet distance", fixed(before.value, digits), fixed(after.value, digits), note)
        )
    return lines


def _with_sign(at: Estimate) -> str:
    return DASH if at.value is None else f"{percent(at.value)}%"


def _share(at: Estimate, *, signed: bool = False, best: bool = False) -> Cell:
    return Cell(percent(at.value, signed=signed), interval(at), best)


def _plain(at: Estimate, digits: int) -> Cell:
    return Cell(fixed(at.value, digits), interval(at, digits, scale=1.0))


def _kid(at: Estimate) -> Cell:
    """Its kernel is of third degree: some thousandths with Inception's features, thousands with others."""
    return _plain(at, 0 if at.value is not None and abs(at.value) >= 100 else 3)


def _is_empty(cells: Sequence[Cell]) -> bool:
    return all(cell.text == DASH for cell in cells)


def success(summary: Mapping[str, Any]) -> list[Group]:
    """By split and category: one cell a model, the gain of the aligned model, the images of a model."""
    groups = []
    for split, label in SPLITS.items():
        rows = []
        for category, name in CATEGORIES.items():
            at = [estimate(summary, "success", model, split, category) for model in MODELS]
            values = [e.value for e in at if e.value is not None]
            if not values:
                continue
            cells = [_share(e, best=len(values) > 1 and e.value == max(values)) for e in at]
            gain = _share(estimate(summary, "gain", "aligned", split, category), signed=True)
            images = max((e.n for e in at if e.n is not None), default=None)
            rows.append(Row(name, [*cells, gain, Cell(fixed(images, 0))]))
        if rows:
            groups.append(Group(label, rows))
    return groups


def fidelity(summary: Mapping[str, Any]) -> list[Row]:
    """One row a model: its guidance scale, Fréchet distance, KID, diversity, readable share."""
    rows = []
    for model in MODELS:
        scale = number(summary, "guidance", model)
        cells = [
            Cell(DASH if scale is None else f"{scale:g}"),
            _plain(estimate(summary, "fidelity", model, "frechet"), 1),
            _kid(estimate(summary, "fidelity", model, "kid")),
            _plain(estimate(summary, "diversity", model), 2),
            _share(estimate(summary, "readable", model)),
        ]
        if not _is_empty(cells):
            rows.append(Row(MODELS[model].label, cells, mark=model))
    return rows


def frontier_gain(summary: Mapping[str, Any]) -> list[Row]:
    """One row a tuned model: success above the base's at equal guidance, and at equal Fréchet distance."""
    rows = []
    for model in TUNED:
        found = node(summary, "frontier_gain", model)
        cells = [
            _share(estimate(found, key), signed=True) for key in ("at_equal_guidance", "at_equal_frechet")
        ]
        if not _is_empty(cells):
            rows.append(Row(MODELS[model].label, cells, mark=model))
    return rows


def votes(summary: Mapping[str, Any]) -> list[Group]:
    """By question and split: sets won, tied, lost, and the net win."""
    groups = []
    for question, asked in QUESTIONS.items():
        rows = []
        for split, label in SPLITS.items():
            found = node(summary, "net_win", question, split)
            counts = [number(found, part) for part in ("wins", "ties", "losses")]
            if not any(counts) and estimate(found).value is None:
                continue  # nobody was asked
            rows.append(
                Row(
                    label,
                    [*(Cell(fixed(count, 0)) for count in counts), _share(estimate(found), signed=True)],
                )
            )
        if rows:
            groups.append(Group(asked, rows))
    return groups


def best_of_sizes(summary: Mapping[str, Any]) -> list[int]:
    """Every n for which some model has a best-of-n success, ascending."""
    found = [node(summary, "best_of", model) for model in MODELS]
    sizes = {
        int(n)
        for of in found
        if isinstance(of, Mapping)
        for n in of
        if str(n).isdigit() and estimate(of, n).value is not None
    }
    return sorted(sizes)


def best_of(summary: Mapping[str, Any]) -> list[Row]:
    """One row a model, one cell a size of `best_of_sizes`; below it, what a perfect reward would reach."""
    rows = []
    for model in MODELS:
        at = [node(summary, "best_of", model, n) for n in best_of_sizes(summary)]
        cells = [_share(estimate(found)) for found in at]
        if not cells or _is_empty(cells):
            continue
        rows.append(Row(MODELS[model].label, cells, mark=model))
        perfect = [Cell(percent(number(found, "perfect"))) for found in at]
        if not _is_empty(perfect):
            rows.append(Row("with a perfect reward", perfect))
    return rows


def reward(summary: Mapping[str, Any]) -> list[Group]:
    """By split and score: measures of ranking, the highest marked; calibration error, the lowest marked."""
    groups = []
    for split, label in SPLITS.items():
        measured = {
            scorer: {metric: estimate(summary, scorer, split, metric) for metric in _RANKING}
            for scorer in reversed(SCORERS)
        }
        rows = []
        for scorer, at in measured.items():
            cells = []
            for metric, e in at.items():
                rivals = [o[metric].value for o in measured.values()]
                values = [value for value in rivals if value is not None]
                best = min(values, default=None) if metric == "ece" else max(values, default=None)
                is_best = len(values) > 1 and e.value == best
                cells.append(Cell(fixed(e.value, 3), interval(e, 2, scale=1.0), is_best))
            if not _is_empty(cells):
                rows.append(Row(SCORERS[scorer].label, cells, mark=scorer))
        images, good = number(summary, "reward", split, "n"), number(summary, "reward", split, "good")
        counted = (
            f", {fixed(images, 0)} images, {fixed(good, 0)} of them good"
            if images and good is not None
            else ""
        )
        if rows:
            groups.append(Group(label + counted, rows))
    return groups


def feedback(summary: Mapping[str, Any]) -> list[Row]:
    """The paper's table 2: images judged, judgements, shares of good, bad and skipped, by category."""
    found = node(summary, "feedback")
    if not isinstance(found, Mapping):
        return []
    names = [name for name in (*CATEGORIES, "total") if name in found]
    rows = []
    for name in names:
        counts = [number(found, name, key) for key in ("candidates", "judgements")]
        shares = [number(found, name, verdict) for verdict in ("good", "bad", "skip")]
        cells = [*(Cell(fixed(count, 0)) for count in counts), *(Cell(percent(share, 1)) for share in shares)]
        rows.append(Row(CATEGORIES.get(name, "All"), cells, is_total=name == "total"))
    return rows


def raters(summary: Mapping[str, Any]) -> list[Row]:
    """Who judged: judgements, shares of good, bad and skipped."""
    found = node(summary, "raters", "by_rater")
    if not isinstance(found, Mapping):
        return []
    rows = []
    for name in found:
        shares = [number(found, name, verdict) for verdict in ("good", "bad", "skip")]
        cells = [Cell(fixed(number(found, name, "judgements"), 0)), *(Cell(percent(s, 1)) for s in shares)]
        rows.append(Row(str(name), cells))
    return rows


def raters_agree(summary: Mapping[str, Any]) -> str:
    """How many judged, and how much they agree, in words; empty when it is not known."""
    count, items = number(summary, "raters", "count"), number(summary, "raters", "items")
    alpha = number(summary, "raters", "alpha")
    if not count:
        return ""
    judged = "One rater judged." if count == 1 else f"{fixed(count, 0)} raters judged."
    if alpha is None or not items:
        return judged
    return (
        f"{judged} On the {fixed(items, 0)} images that two or more did not skip, their agreement is "
        f"Krippendorff’s α {fixed(alpha)} (1 is full agreement, 0 is chance)."
    )


def calibration_note(summary: Mapping[str, Any]) -> str:
    """How far the reward was off as a probability where it was calibrated, in words; empty when it was
    not."""
    found = {key: number(summary, "calibration", key) for key in ("images", "ece", "ece_calibrated")}
    if found["ece"] is None or not found["images"]:
        return ""
    scaled = ""
    if found["ece_calibrated"] is not None:
        scaled = f", {fixed(found['ece_calibrated'])} once scaled (each half by what was fitted on the other)"
    return (
        f"On the {fixed(found['images'], 0)} judged images that learning left out, the reward’s calibration "
        f"error was {fixed(found['ece'])} as it came{scaled}."
    )


def labels_are_true(summary: Mapping[str, Any]) -> str:
    """How many of the raters' labels are true and what it does to the reward's AUC, in words; or empty."""
    right = estimate(summary, "labels", "right")
    by_label, by_truth = (estimate(summary, "labels", "reward", name) for name in ("label", "truth"))
    if right.value is None or by_label.value is None or by_truth.value is None:
        return ""
    areas = [f"{fixed(at.value, 3)} ({interval(at, 3, scale=1.0)})" for at in (by_label, by_truth)]
    return (
        f"Of the raters’ labels {percent(right.value, 1)}% are what raters would say who make no mistakes. "
        f"By the raters’ labels the reward’s area is {areas[0]} over all splits, by the true ones {areas[1]}."
    )


def agreement(summary: Mapping[str, Any]) -> str:
    """How often judge and evaluator agree, in words; empty when it was not measured."""
    at, kappa = estimate(summary, "agreement"), number(summary, "agreement", "kappa")
    if at.value is None:
        return ""
    span = f" ({interval(at)})" if interval(at) else ""
    return f"{percent(at.value)}%{span}" + (f", Cohen’s κ {fixed(kappa)}" if kappa is not None else "")


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested names and their texts in one list: {"clip": {"digest": "ab"}} is [("clip digest", "ab")]."""
    if isinstance(tree, Mapping):
        return [leaf for key, child in tree.items() for leaf in leaves(child, f"{prefix} {key}".strip())]
    return [(prefix.replace("_", " "), DASH if tree is None else str(tree))] if prefix else []


def stages(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(stage, duration, per cent of the longest stage), and last what they took together."""
    found = node(summary, "seconds")
    if not isinstance(found, Mapping):
        return []
    seconds = {str(name): finite(value) for name, value in found.items() if name != "total"}
    known = [value for value in seconds.values() if value is not None]
    longest = max(known, default=0.0)
    rows = [
        (re.sub(r"[_-]+", " ", name), duration(value), 100 * (value or 0.0) / longest if longest else 0.0)
        for name, value in seconds.items()
    ]
    return [*rows, ("all", duration(sum(known)), 0.0)] if rows else []
