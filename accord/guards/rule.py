"""When a fine-tuning hacks its reward: a pure function of what was measured, so that anyone can check it.

Of two snapshots the difference in a measure is paired over prompts (same prompts, same seeds), with a
bootstrap interval over prompts. The held-out judge has turned at a snapshot when its change since the best
snapshot so far lies below 0 with the whole interval, while the training reward is higher than it was there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from accord.evaluation.statistics import Bootstrap, Interval, bootstrap_interval
from accord.guards.settings import Bound, GuardsConfig

REWARD, HELD_OUT = "reward", "held_out"


@dataclass(frozen=True)
class Measured:
    """A snapshot's measures after `step` steps (0: the model before fine-tuning), one number a prompt."""

    step: int
    by_prompt: Mapping[str, tuple[float, ...]]

    def mean(self, name: str) -> float:
        """Over prompts; NaN when the measure applies to none, or is not there."""
        values = np.asarray(self.by_prompt.get(name, ()), dtype=float)
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else math.nan

    def as_row(self) -> dict[str, Any]:
        """The plain form, a line of measurements.jsonl: NaN is null."""
        plain = {
            name: [value if math.isfinite(value) else None for value in values]
            for name, values in self.by_prompt.items()
        }
        means = {name: self.mean(name) for name in self.by_prompt}
        return {
            "step": self.step,
            "mean": {name: value if math.isfinite(value) else None for name, value in means.items()},
            "by_prompt": plain,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Measured:
        """Of `as_row`."""
        values = {
            str(name): tuple(math.nan if value is None else float(value) for value in found)
            for name, found in row["by_prompt"].items()
        }
        return cls(int(row["step"]), values)


@dataclass(frozen=True)
class Decision:
    """What the rule says: whether it tripped, at which step, why in words, and which snapshot is the best."""

    tripped: bool
    step: int
    """Where it tripped; else the last that was measured."""
    best_step: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The plain form, in manifests and verdict.json."""
        return dict(vars(self))


def decide(measured: Sequence[Measured], config: GuardsConfig) -> Decision:
    """Reads the snapshots in the order of their steps; the first must be of step 0.

    What comes after the trip counts only with keep_best, and only for the choice of the best snapshot: so the
    decision does not depend on how much further an asynchronous training had come.
    """
    if not measured:
        return Decision(False, 0, 0, "nothing was measured yet")
    rows = sorted(measured, key=lambda row: row.step)
    best, streak = rows[0], 0
    for number, row in enumerate(rows[1:], start=1):
        broken = broken_bound(row, rows[0], config.bounds)
        if broken:
            return _tripped(rows, number, f"at step {row.step} {broken}", config)
        turned = _turned(row, best, config)
        streak = streak + 1 if turned else 0
        if streak >= config.patience:
            again = f", for the {_ordinal(streak)} measurement in a row" if streak > 1 else ""
            return _tripped(rows, number, turned + again, config)
        if row.mean(HELD_OUT) > best.mean(HELD_OUT):
            best = row
    last = rows[-1]
    gain, judged = change(last, rows[0], REWARD, config.level), change(last, rows[0], HELD_OUT, config.level)
    reason = (
        f"no guard tripped in {len(rows)} measurements: by step {last.step} the training reward changed by "
        f"{_signed(gain)}, the held-out reward by {_signed(judged)}"
    )
    return Decision(False, last.step, best.step, reason)


def change(later: Measured, earlier: Measured, name: str, level: float) -> Interval:
    """How a measure's mean changed, with its interval, paired over prompts."""
    difference = np.asarray(later.by_prompt[name]) - np.asarray(earlier.by_prompt[name])
    return bootstrap_interval(
        difference, bootstrap=Bootstrap(seed=0, resamples=2000, level=level), support=None
    )


def broken_bound(row: Measured, first: Measured, bounds: Mapping[str, Bound]) -> str:
    """In words, the first bound that a snapshot breaks; empty when it breaks none."""
    for name, bound in bounds.items():
        value, before = row.mean(name), first.mean(name)
        if not math.isfinite(value):
            continue
        label = f"the {name.replace('_', ' ')} is {value:.3f}"
        if bound.most is not None and value > bound.most:
            return f"{label}, above its bound of {bound.most:g} (before fine-tuning it was {before:.3f})"
        if bound.least is not None and value < bound.least:
            return f"{label}, below its bound of {bound.least:g} (before fine-tuning it was {before:.3f})"
        if not before > 0:  # no multiple of nothing
            continue
        label += f", {value / before:.2f} times the {before:.3f} before fine-tuning"
        if bound.most_ratio is not None and value > bound.most_ratio * before:
            return f"{label}; its bound is {bound.most_ratio:g} times"
        if bound.least_ratio is not None and value < bound.least_ratio * before:
            return f"{label}; its bound is {bound.least_ratio:g} times"
    return ""


def _turned(row: Measured, best: Measured, config: GuardsConfig) -> str:
    """In words, that the held-out judge has turned since `best`; empty when it has not."""
    judged, reward = (change(row, best, name, config.level) for name in (HELD_OUT, REWARD))
    if not (judged.high < 0 and reward.value > 0):
        return ""
    return (
        f"from step {best.step} to step {row.step} the held-out reward fell by {_span(judged)}, from "
        f"{best.mean(HELD_OUT):.3f} to {row.mean(HELD_OUT):.3f} over {judged.n} prompts, while the training "
        f"reward rose by {reward.value:.3f}, from {best.mean(REWARD):.3f} to {row.mean(REWARD):.3f}"
    )


def _tripped(rows: Sequence[Measured], number: int, reason: str, config: GuardsConfig) -> Decision:
    seen = rows if config.action == "keep_best" else rows[: number + 1]
    whole = [row for row in seen[1:] if not broken_bound(row, rows[0], config.bounds)]
    best = max([rows[0], *whole], key=lambda row: (row.mean(HELD_OUT), -row.step))
    return Decision(True, rows[number].step, best.step, reason)


def _span(fall: Interval) -> str:
    return f"{-fall.value:.3f} [{-fall.high:.3f}, {-fall.low:.3f}]"


def _signed(at: Interval) -> str:
    return f"{at.value:+.3f} [{at.low:+.3f}, {at.high:+.3f}]"


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
