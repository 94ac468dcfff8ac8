"""The gate: whether what was measured of a model lets it serve. Plain numbers in, checks out.

What is measured is a flat table of numbers, taken from a run's summary.json once, when the model is
registered:

net_win.SPLIT, net_win.SPLIT.low   net alignment win by votes, and the lower end of its interval
frechet_ratio, readable_ratio, diversity_ratio   aligned over base
second_reward                      change of the mean of a reward that was not trained on
latency_ratio, seconds_per_image    aligned over base, and of the aligned model
reward_auc, reward_auc.low         of the reward model, on held-out labels of seen prompts
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accord.prompts import Split
from accord.registry.settings import GateConfig

DIFFUSION = "diffusion"
REWARD = "reward"
KINDS = (DIFFUSION, REWARD)


@dataclass(frozen=True)
class Check:
    """One requirement; `measured` is None where nothing was measured, and then it is not met."""

    name: str
    measured: float | None
    required: str
    passed: bool

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.4g}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {measured}, required {self.required}"


def measurements(kind: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary.json that the gate looks at; what the run could not measure is absent."""
    found: dict[str, float | None] = {}
    if kind == REWARD:
        found["reward_auc"] = _number(summary, "reward", Split.SEEN, "auc", "value")
        found["reward_auc.low"] = _number(summary, "reward", Split.SEEN, "auc", "low")
    else:
        for split in Split:
            found[f"net_win.{split}"] = _number(summary, "net_win", "alignment", split, "value")
            found[f"net_win.{split}.low"] = _number(summary, "net_win", "alignment", split, "low")
        for name, *path in (
            ("frechet_ratio", "fidelity", "MODEL", "frechet"),
            ("readable_ratio", "readable", "MODEL", "value"),
            ("diversity_ratio", "diversity", "MODEL", "value"),
        ):
            found[name] = _ratio(summary, path)
        found["latency_ratio"] = _ratio(summary, ["latency", "MODEL", "seconds_per_image"])
        found["seconds_per_image"] = _number(summary, "latency", "aligned", "seconds_per_image")
        found["second_reward"] = _number(summary, "change", "aligned", "second_reward", "value")
    return {name: value for name, value in found.items() if value is not None}


def check(kind: str, measured: Mapping[str, float], config: GateConfig) -> list[Check]:
    """Every requirement on a model of this kind. The gate is passed when each check is."""
    if kind == REWARD:
        return [_above("reward_auc.low", measured, config.min_reward_auc)]
    checks = [_above(f"net_win.{split}.low", measured, low) for split, low in config.net_win.items()]
    checks += [
        _at_most("frechet_ratio", measured, config.max_frechet_ratio),
        _at_least("readable_ratio", measured, config.min_readable_ratio),
        _at_least("diversity_ratio", measured, config.min_diversity_ratio),
        _at_least("second_reward", measured, config.min_second_reward_change),
        _at_most("latency_ratio", measured, config.max_latency_ratio),
    ]
    if config.max_seconds_per_image is not None:
        checks.append(_at_most("seconds_per_image", measured, config.max_seconds_per_image))
    return checks


def _above(name: str, measured: Mapping[str, float], bound: float) -> Check:
    value = measured.get(name)
    return Check(name, value, f"> {bound:g}", value is not None and value > bound)


def _at_least(name: str, measured: Mapping[str, float], bound: float) -> Check:
    value = measured.get(name)
    return Check(name, value, f">= {bound:g}", value is not None and value >= bound)


def _at_most(name: str, measured: Mapping[str, float], bound: float) -> Check:
    value = measured.get(name)
    return Check(name, value, f"<= {bound:g}", value is not None and value <= bound)


def _ratio(summary: Mapping[str, Any], path: list[str]) -> float | None:
    aligned, base = (
        _number(summary, *(model if part == "MODEL" else part for part in path))
        for model in ("aligned", "base")
    )
    return None if aligned is None or not base else aligned / base


def _number(tree: Any, *path: str) -> float | None:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, bool) or not isinstance(tree, int | float) or not math.isfinite(tree):
        return None
    return float(tree)
