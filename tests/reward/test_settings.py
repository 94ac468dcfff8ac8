import inspect

import pytest
from pydantic import ValidationError

from accord.reward.settings import TEXT_NORMALISED_OPTIONS, RewardConfig, RewardTerm
from accord.reward.textnorm import TextNormalised


def test_defaults_are_the_papers() -> None:
    config = RewardConfig()
    assert (config.hidden_size, config.layers, config.combine) == (1024, 2, "concat")
    assert (config.auxiliary_weight, config.temperature) == (0.5, 2.0)


@pytest.mark.parametrize("key", ["num_prompts", "temperature", "steps", "validation_fraction", "dropout"])
def test_impossible_values_are_refused(key: str) -> None:
    impossible = {
        "num_prompts": 1,
        "temperature": 0.0,
        "steps": 0,
        "validation_fraction": 0.7,
        "dropout": 1.0,
    }
    with pytest.raises(ValidationError, match=key):
        RewardConfig.model_validate({key: impossible[key]})


def test_a_penalty_needs_an_ensemble() -> None:
    with pytest.raises(ValidationError, match="set ensemble to 2 or more"):
        RewardConfig(uncertainty_penalty=0.5)
    assert RewardConfig(uncertainty_penalty=0.5, ensemble=2).uncertainty_penalty == 0.5


def test_settings_younger_than_the_first_runs_are_described_only_when_used() -> None:
    first_runs = {
        *("combine", "hidden_size", "layers", "auxiliary_weight", "temperature", "num_prompts", "steps"),
        *("batch_size", "learning_rate", "schedule", "weight_decay", "dropout", "validation_fraction"),
        *("log_every", "checkpoint_every"),
    }
    assert set(RewardConfig().described()) == first_runs
    changed = RewardConfig(ensemble=3, fast=True).described()
    assert changed.keys() - first_runs == {"ensemble", "fast"}


def test_a_scorer_is_built_in_or_a_function() -> None:
    assert RewardTerm(scorer="text_normalised").title == "text_normalised"
    assert RewardTerm(scorer="my.package:make_it").title == "make_it"
    assert RewardTerm(scorer="my.package:make_it", name="beauty").title == "beauty"
    with pytest.raises(ValidationError, match="there is no scorer 'rewrd'; expected one of reward,"):
        RewardTerm(scorer="rewrd")
    with pytest.raises(ValidationError, match="weight"):
        RewardTerm(scorer="reward", weight=0.0)
    with pytest.raises(ValidationError, match="text_normalised has no option tau; it has temperature, num"):
        RewardTerm(scorer="text_normalised", options={"tau": 1})
    options = set(inspect.signature(TextNormalised).parameters) - {"model", "grammar"}
    assert options == {*TEXT_NORMALISED_OPTIONS}
