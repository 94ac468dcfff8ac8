"""Config of reward learning. No torch here, so that reading a recipe is quick."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from accord.config import Config

Combine = Literal["concat", "concat_product", "adapter"]


class RewardConfig(Config):
    """How a reward model is learned. The paper (section 3.2) states the head, T = 2 and lambda = 0.5; the
    optimiser, the learning rate, the batch size and the number of contrast prompts are not in it."""

    combine: Combine = "concat"
    """concat: the head sees (image, text), as in the paper; concat_product: their elementwise product too.
    adapter: no MLP, but a learned change of the CLIP similarity, from which it starts."""
    hidden_size: int = Field(default=1024, ge=1)
    layers: int = Field(default=2, ge=1)
    """Hidden layers of the head."""
    auxiliary_weight: float = Field(default=0.5, ge=0.0)
    """lambda: the weight of the prompt classification loss; 0 learns from the labels alone."""
    temperature: float = Field(default=2.0, gt=0.0)
    """T of Eq. 1."""
    num_prompts: int = Field(default=10, ge=2)
    """N of Eq. 1: the true prompt and N - 1 perturbed ones."""
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    """Judged images a step, over all workers."""
    learning_rate: float = Field(default=5e-4, gt=0.0)
    schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: the learning rate falls to 0 at the last step."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of hidden units dropped; all prompts of one image are compared by the same units."""
    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the judged images that is never trained on; calibration is fitted on it. 0 for none."""
    log_every: int = Field(default=20, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _only_an_mlp_drops_units(self) -> RewardConfig:
        if self.combine == "adapter" and self.dropout > 0:
            raise ValueError(
                f"combine adapter has no hidden units to drop: set dropout to 0, not {self.dropout}"
            )
        return self

    @model_validator(mode="after")
    def _calibration_has_images(self) -> RewardConfig:
        if self.validation_fraction > 0.5:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}: more than half of the judgements would "
                "teach nothing"
            )
        return self
