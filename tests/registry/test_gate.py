"""The gate: each requirement is one that a model can fail."""

import copy
from typing import Any

import pytest

from accord.prompts import Split
from accord.registry.gate import DIFFUSION, REWARD, check, measurements
from accord.registry.settings import GateConfig
from tests.registry.run import GOOD


def failed(summary: dict[str, Any], kind: str = DIFFUSION, **gate: Any) -> list[str]:
    return [
        one.name for one in check(kind, measurements(kind, summary), GateConfig(**gate)) if not one.passed
    ]


def changed(path: str, value: Any) -> dict[str, Any]:
    summary: dict[str, Any] = copy.deepcopy(GOOD)
    node = summary
    *parents, last = path.split("/")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return summary


def test_a_good_model_passes() -> None:
    assert failed(GOOD) == []
    assert failed(GOOD, REWARD) == []


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("net_win/alignment/seen/low", 0.0, "net_win.seen.low"),
        ("net_win/alignment/seen/low", None, "net_win.seen.low"),
        ("fidelity/aligned/frechet", 221.0, "frechet_ratio"),
        ("fidelity/base/frechet", 0.0, "frechet_ratio"),
        ("readable/aligned/value", 0.8, "readable_ratio"),
        ("diversity/aligned/value", 23.0, "diversity_ratio"),
        ("diversity/aligned/value", float("nan"), "diversity_ratio"),
        ("change/aligned/second_reward", {"value": -0.01}, "second_reward"),
        ("change/aligned/second_reward", {"value": None}, "second_reward"),
        ("change", {}, "second_reward"),
        ("latency/aligned/seconds_per_image", 0.76, "latency_ratio"),
        ("latency", {}, "latency_ratio"),
    ],
)
def test_what_got_worse_or_was_not_measured_fails(path: str, value: Any, name: str) -> None:
    assert failed(changed(path, value)) == [name]


def test_seconds_an_image_can_be_bounded() -> None:
    assert failed(GOOD, max_seconds_per_image=0.56) == []
    assert failed(GOOD, max_seconds_per_image=0.54) == ["seconds_per_image"]


def test_a_reward_model_must_rank_better_than_chance() -> None:
    assert failed(changed("reward/seen/auc/low", 0.5), REWARD) == ["reward_auc.low"]


def test_further_splits_can_be_required() -> None:
    gate = {"net_win": {Split.SEEN: 0.0, Split.UNSEEN_OBJECT: -0.1}}
    assert failed(GOOD, **gate) == ["net_win.unseen_object.low"]
    assert failed(changed("net_win/alignment/unseen_object", {"value": 0.1, "low": -0.05}), **gate) == []


def test_a_check_says_what_was_measured_and_what_is_required() -> None:
    (bad,) = [
        c
        for c in check(DIFFUSION, measurements(DIFFUSION, GOOD), GateConfig(max_frechet_ratio=0.9))
        if not c.passed
    ]
    assert str(bad) == "FAIL  frechet_ratio: 0.95, required <= 0.9"
