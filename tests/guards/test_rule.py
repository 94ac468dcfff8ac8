"""The rule: it trips when it should, says why, keeps the right snapshot, and seldom trips on noise."""

import json
import math

import numpy as np
import pytest

from accord.config import validate
from accord.errors import ConfigError
from accord.guards.rule import Measured, decide
from accord.guards.settings import GuardsConfig

PROMPTS = 24


def config(**changes: object) -> GuardsConfig:
    return validate(GuardsConfig, dict(changes), "guards")


def measured(step: int, seed: int = 0, noise: float = 0.05, **means: float) -> Measured:
    """Prompts differ among themselves in the same way at every step, as fixed prompts do."""
    prompt_P = np.random.default_rng(1).normal(0, 0.2, PROMPTS)
    noise_P = np.random.default_rng([seed, step]).normal(0, noise, PROMPTS)
    values = {"reward": 0.5, "held_out": 0.5, "saturation": 0.4} | means
    return Measured(step, {name: tuple(value + prompt_P + noise_P) for name, value in values.items()})


def hacked() -> list[Measured]:
    """The held-out judge gains until step 100, and then loses, while the training reward rises throughout."""
    held_out = [0.50, 0.54, 0.60, 0.52, 0.44, 0.40]
    return [
        measured(50 * number, reward=0.5 + 0.05 * number, held_out=value)
        for number, value in enumerate(held_out)
    ]


def test_it_trips_when_the_held_out_judge_turns_while_the_reward_rises() -> None:
    decision = decide(hacked(), config(patience=2))
    assert decision.tripped
    assert decision.step == 200, "the second measurement in a row after the best, at 100"
    assert decision.best_step == 100
    assert "from step 100 to step 200 the held-out reward fell by" in decision.reason
    assert "second measurement in a row" in decision.reason
    assert "over 24 prompts, while the training reward rose by" in decision.reason
    assert decide(hacked(), config(patience=1)).step == 150
    assert not decide(hacked()[:4], config(patience=2)).tripped


def test_what_comes_after_the_trip_changes_nothing_unless_all_is_kept() -> None:
    rows = [*hacked(), measured(300, reward=0.9, held_out=0.9)]
    assert decide(rows, config()) == decide(hacked()[:5], config())
    assert decide(list(reversed(rows)), config()) == decide(rows, config()), "rows come in any order"
    assert decide(rows, config(action="keep_best")).best_step == 300


def test_a_model_that_gets_worse_at_both_is_not_hacked() -> None:
    rows = [measured(50 * n, reward=0.5 - 0.05 * n, held_out=0.5 - 0.05 * n) for n in range(6)]
    assert not decide(rows, config()).tripped


def test_only_harm_keeps_the_base_model() -> None:
    rows = [measured(50 * n, reward=0.5 + 0.05 * n, held_out=0.5 - 0.05 * n) for n in range(6)]
    decision = decide(rows, config())
    assert (decision.tripped, decision.step, decision.best_step) == (True, 100, 0)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"most": 0.5}, "above its bound of 0.5"),
        ({"most_ratio": 1.2}, "its bound is 1.2 times"),
    ],
)
def test_a_broken_bound_trips_at_once_and_is_never_the_best(bound: dict[str, float], words: str) -> None:
    rows = [measured(50 * n, noise=0.0, saturation=0.4 + 0.04 * n, held_out=0.5 + 0.01 * n) for n in range(6)]
    decision = decide(rows, config(bounds={"saturation": bound}))
    assert decision.tripped
    assert words in decision.reason
    assert "the saturation is" in decision.reason
    assert decision.best_step == decision.step - 50


def test_a_lower_bound_and_a_measure_that_does_not_apply() -> None:
    rows = [
        Measured(n, {"reward": (0.5,) * 3, "held_out": (0.5,) * 3, "twins": (math.nan,) * 3}) for n in (0, 1)
    ]
    assert not decide(rows, config(measures={"twins": "a:b"}, bounds={"twins": {"most": 0.1}})).tripped
    assert decide(rows, config(bounds={"held_out": {"least": 0.6}})).tripped


def test_rows_survive_json() -> None:
    row = Measured(3, {"reward": (0.1, 0.2), "twins": (math.nan, 1.0)})
    again = Measured.from_row(json.loads(json.dumps(row.as_row(), allow_nan=False)))
    assert again.step == 3
    assert again.by_prompt["reward"] == (0.1, 0.2)
    assert math.isnan(again.by_prompt["twins"][0])
    assert again.mean("twins") == 1.0


def test_noise_alone_seldom_trips() -> None:
    """30 trainings of 12 measurements in which nothing changes but noise."""
    trips = 0
    for seed in range(30):
        rows = []
        for step in range(12):
            noise = np.random.default_rng([seed, step]).normal(0, 0.1, (2, PROMPTS))
            rows.append(Measured(step, {"reward": tuple(noise[0]), "held_out": tuple(noise[1])}))
        trips += decide(rows, config()).tripped
    assert trips <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": {"saturatoin": {"most": 1}}}, "nothing measures saturatoin"),
        ({"bounds": {"saturation": {}}}, "a bound needs"),
        ({"bounds": {"saturation": {"least": 2, "most": 1}}}, "nothing lies between 2.0 and 1.0"),
        ({"bounds": {"reference_distance": {"most_ratio": 2}}}, "0 before fine-tuning, so no ratio"),
        ({"measures": {"reward": "a:b"}}, "reward is measured anyway"),
        ({"prompts": {"colour": 1}}, "two prompts or more"),
        ({"held_out": "judgement"}, "held_out"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
