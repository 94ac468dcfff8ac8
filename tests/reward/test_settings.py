import pytest
from pydantic import ValidationError

from accord.reward.settings import RewardConfig


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
