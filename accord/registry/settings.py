"""The recipe's `registry` section: where models are registered, and what they must show before they serve."""

import os
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, SecretStr

from accord.config import Config, environment_value
from accord.prompts import Split

DEFAULT_URI = "sqlite:///runs/models.db"
URI_VARIABLE = "MLFLOW_REGISTRY_URI"

Share = Annotated[float, Field(ge=-1.0, le=1.0)]


class GateConfig(Config):
    """What a model must show before it serves. It is registered with the model: to serve a model by a weaker
    gate takes a new registration, or --force with a reason, and both are on record.
    """

    net_win: dict[Split, Share] = Field(default_factory=lambda: {Split.SEEN: 0.0})
    """For each split: the lower end of the interval of the net alignment win must be above this."""
    max_frechet_ratio: PositiveFloat = 1.1
    """Fréchet distance to real images, aligned over base."""
    min_readable_ratio: NonNegativeFloat = 0.95
    """Share of readable images, aligned over base."""
    min_diversity_ratio: NonNegativeFloat = 0.8
    """Mean distance between images of one prompt, aligned over base."""
    min_second_reward_change: float = 0.0
    """Change of the mean of a reward that was not trained on (`evaluate.second_reward`): aligned above
    base."""
    max_latency_ratio: PositiveFloat = 1.5
    """Seconds an image, each model at its own guidance on the machine that evaluated, aligned over base."""
    max_seconds_per_image: PositiveFloat | None = None
    """Of the aligned model; null: any."""
    min_reward_auc: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """For a reward model: the lower end of the AUC's interval on held-out labels of seen prompts must be
    above this."""


class RegistryConfig(Config):
    """Where a run's models are registered."""

    uri: SecretStr | None = None
    """MLflow registry URI, or "env:NAME"; by default $MLFLOW_REGISTRY_URI, else SQLite in runs/."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")] = "accord"
    """Models are registered as NAME-diffusion and NAME-reward; runs that compete for one service share it."""
    gate: GateConfig = GateConfig()


def registry_uri(given: str | None = None, config: RegistryConfig | None = None) -> str:
    """The registry's URI: what was given, else $MLFLOW_REGISTRY_URI, else the recipe's, else SQLite in runs/.

    It may hold a password: never print it.

    Raises:
        ConfigError: it is to be read from the environment, and is not there.
    """
    configured = config.uri.get_secret_value() if config is not None and config.uri is not None else None
    uri = given or os.environ.get(URI_VARIABLE) or configured or DEFAULT_URI
    return environment_value(uri, "the registry's URI")
