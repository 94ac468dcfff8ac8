"""Several runs of several arms, over seeds: what each arm gains, with intervals from seed to seed.

A summary (summary.py) compares one base with one aligned model; its intervals say how sure that is for these
two models. Whether a way of training gains is another question: here a seed is one observation. It draws the
prompts, the images, the raters, the reward's and the model's training, and the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from accord.evaluation.statistics import Interval
from accord.prompts import Split

Summary = Mapping[str, Any]
Measure = Callable[[Summary], float]

_SPLITS = tuple(str(split) for split in Split)


def seeds_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean over seeds with Student's t interval; NaN values are left out, one alone has no interval."""
    finite = np.array([value for value in values if np.isfinite(value)], dtype=float)
    if len(finite) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(finite.mean())
    if len(finite) == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    half = float(stats.t.ppf(0.5 + level / 2, len(finite) - 1) * finite.std(ddof=1) / np.sqrt(len(finite)))
    return Interval(mean, mean - half, mean + half, len(finite))


def candidates_for(curve: Mapping[int, float], goal: float) -> float:
    """How many candidates a curve of best-of-n success needs to reach `goal`, linear between its sizes.

    Infinite when its largest size does not reach it.
    """
    sizes = sorted(curve)
    if not sizes or not np.isfinite(goal):
        return float("nan")
    if curve[sizes[0]] >= goal:
        return float(sizes[0])
    for low, high in pairwise(sizes):
        if curve[high] >= goal:
            share = (goal - curve[low]) / (curve[high] - curve[low])
            return float(low + share * (high - low))
    return float("inf")


def measures() -> dict[str, Measure]:
    """What is compared of each run, by name. Shares are in [0, 1], ratios are to the base's own value."""
    found: dict[str, Measure] = {
        "success.base": lambda s: _pooled(s, "base"),
        "success.aligned": lambda s: _pooled(s, "aligned"),
        "gain.all": lambda s: _value(s, "gain", "aligned", "all", "overall"),
    }
    for split in _SPLITS:
        found[f"gain.{split}"] = _reader("gain", "aligned", split, "overall")
    for category in ("count", "colour", "background", "combination"):
        found[f"gain.all.{category}"] = _reader("gain", "aligned", "all", category)
    found["gain.at_equal_guidance"] = _reader("frontier_gain", "aligned", "at_equal_guidance")
    found["gain.at_equal_frechet"] = _reader("frontier_gain", "aligned", "at_equal_frechet")
    for question in ("alignment", "fidelity"):
        for outcome in ("net", "wins", "losses"):
            found[f"votes.{question}.{outcome}"] = _votes(question, outcome)
    found |= {
        "ratio.frechet": lambda s: _ratio(s, "fidelity", "frechet"),
        "ratio.readable": lambda s: _ratio(s, "readable", "value"),
        "ratio.diversity": lambda s: _ratio(s, "diversity", "value"),
        "readable.base": _reader("readable", "base"),
        "readable.aligned": _reader("readable", "aligned"),
        "guidance.base": lambda s: _number(s, "guidance", "base"),
        "guidance.aligned": lambda s: _number(s, "guidance", "aligned"),
        "best_of.base": lambda s: _best_of(s, "base"),
        "best_of.aligned": lambda s: _best_of(s, "aligned"),
        "best_of.gain": lambda s: _best_of(s, "aligned") - _best_of(s, "base"),
    }
    found["reward.auc_over_clip"] = lambda s: _over_unseen(s, "reward_gain", "clip")
    found["reward.auc_over_no_auxiliary"] = lambda s: _over_unseen(s, "reward_gain", "reward_no_auxiliary")
    found["reward.auc"] = lambda s: _over_unseen(s, "reward", "auc_within_category", last=True)
    found["clip.auc"] = lambda s: _over_unseen(s, "clip", "auc_within_category", last=True)
    found["reward.pairwise"] = lambda s: _over_unseen(s, "reward", "pairwise_accuracy", last=True)
    found["reward.ece"] = lambda s: float(
        np.mean([_number(s, "reward", split, "ece") for split in _SPLITS[1:]])
    )
    return found


def build_study(summaries: Mapping[str, Mapping[int, Summary]]) -> dict[str, Any]:
    """{arm: {measure: {value, low, high, n, seeds: {seed: value}}}} of {arm: {seed: summary}}.

    Besides the `measures`, "best_of.candidates": how many candidates the aligned model needs for the success
    of the base's largest best-of-n. Its value is the median over seeds; a seed that even the most candidates
    (`most`) do not suffice for has null there, and counts as more.
    """
    table: dict[str, Any] = {}
    for arm, by_seed in summaries.items():
        table[arm] = {}
        for name, measure in measures().items():
            values = {seed: measure(summary) for seed, summary in sorted(by_seed.items())}
            plain = {str(seed): value if np.isfinite(value) else None for seed, value in values.items()}
            interval = {
                key: value if np.isfinite(value) else None
                for key, value in seeds_interval(list(values.values())).as_dict().items()
            }
            table[arm][name] = {**interval, "seeds": plain}
        table[arm]["best_of.candidates"] = _candidates(by_seed)
    return table


def compare_arms(study: Mapping[str, Any], first: str, second: str, measure: str) -> Interval:
    """`first` minus `second`, paired by seed: both arms of a seed share its images, raters and test."""
    one, other = (study[arm][measure]["seeds"] for arm in (first, second))
    both = [seed for seed in one if one[seed] is not None and other.get(seed) is not None]
    return seeds_interval([one[seed] - other[seed] for seed in both])


def _number(summary: Any, *path: str) -> float:
    found = summary
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else float("nan")


def _value(summary: Summary, *path: str) -> float:
    return _number(summary, *path, "value")


def _reader(*path: str) -> Measure:
    return lambda summary: _value(summary, *path)


def _pooled(summary: Summary, model: str) -> float:
    """Success over all splits, weighted by their images."""
    cells = [summary["success"][model][split]["overall"] for split in _SPLITS]
    total = sum(cell["n"] for cell in cells)
    if not total:
        return float("nan")
    return float(sum(cell["value"] * cell["n"] for cell in cells if cell["n"]) / total)


def _votes(question: str, outcome: str) -> Measure:
    """The share of all sets, over the splits, that were won, lost, or won less lost."""

    def share(summary: Summary) -> float:
        cells = [summary["net_win"][question][split] for split in _SPLITS]
        wins, losses, ties = (sum(cell[name] for cell in cells) for name in ("wins", "losses", "ties"))
        total = wins + losses + ties
        count = {"wins": wins, "losses": losses, "net": wins - losses}[outcome]
        return float(count / total) if total else float("nan")

    return share


def _ratio(summary: Summary, *path: str) -> float:
    name, *rest = path
    aligned, base = (_number(summary, name, model, *rest) for model in ("aligned", "base"))
    return aligned / base if base else float("nan")


def _curve(summary: Summary, model: str) -> dict[int, float]:
    found = summary["best_of"][model]
    return {int(n): float(cell["value"]) for n, cell in found.items() if cell["value"] is not None}


def _best_of(summary: Summary, model: str) -> float:
    curve = _curve(summary, model)
    return curve[max(curve)] if curve else float("nan")


def _candidates(by_seed: Mapping[int, Summary]) -> dict[str, Any]:
    curves = {seed: _curve(summary, "aligned") for seed, summary in sorted(by_seed.items())}
    needed = {
        seed: candidates_for(curve, _best_of(by_seed[seed], "base"))
        for seed, curve in curves.items()
        if curve
    }
    measured = [value for value in needed.values() if not np.isnan(value)]
    median = float(np.median(measured)) if measured else float("nan")
    return {
        "value": median if np.isfinite(median) else None,
        "low": None,
        "high": None,
        "n": len(measured),
        "most": max((max(curve) for curve in curves.values() if curve), default=None),
        "seeds": {str(seed): value if np.isfinite(value) else None for seed, value in needed.items()},
    }


def _over_unseen(summary: Summary, *path: str, last: bool = False) -> float:
    """The mean over the two unseen splits; `last`: the split comes before the last key."""
    unseen = [split for split in _SPLITS if split != str(Split.SEEN)]
    paths = [(*path[:-1], split, path[-1]) if last else (*path, split) for split in unseen]
    return float(np.mean([_value(summary, *keys) for keys in paths]))
