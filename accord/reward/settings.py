"""Config of reward learning, and of the rewards that are combined. No torch here, so that reading a recipe is
quick."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from accord.config import Config

Combine = Literal["concat", "concat_product", "adapter"]
CalibrationMethod = Literal["platt", "temperature"]
Normalise = Literal["none", "logistic", "rank"]

BUILT_IN_SCORERS = ("reward", "reward_no_auxiliary", "text_normalised", "clip")
"""Scorers that a run has without any code of one's own; see accord.reward.scorers."""

TEXT_NORMALISED_OPTIONS = ("temperature", "num_prompts", "seed")

_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class RewardConfig(Config):
    """How a reward model is learned. The paper (section 3.2) states the head, T = 2 and lambda = 0.5; the
    optimiser, the learning rate, the batch size and the number of contrast prompts are not in it."""

    combine: Combine = "concat"
    """concat: the head sees (image, text), as in the paper; concat_product: their elementwise product too.
    adapter: no MLP, but a learned change of the CLIP similarity, from which it starts."""
    hidden_size: int = Field(default=1024, ge=1)
    layers: int = Field(default=2, ge=1)
    """Hidden layers of the head."""
    ensemble: int = Field(default=1, ge=1, le=64)
    """Heads that are learned together, seeded apart; the reward is their mean, its uncertainty their standard
    deviation."""
    uncertainty_penalty: float = Field(default=0.0, ge=0.0)
    """k: an ensemble's reward is mean - k * standard deviation (a lower confidence bound), at least 0."""
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
    calibration: CalibrationMethod = "platt"
    """How rewards become probabilities: sigmoid(a * logit(r) + b), or with temperature sigmoid(logit(r) / T),
    which leaves 1/2 where it is."""
    fast: bool = False
    """For large sets: each image and each prompt of a batch goes through the head's first maps once, instead
    of once a pair, and AdamW is fused. The same mathematics, in another order of rounding."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products while learning; weights, losses and scoring are float32. bfloat16 is several
    times faster where the processor has it."""
    log_every: int = Field(default=20, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)

    def described(self) -> dict[str, Any]:
        """All settings as plain values, but those that are younger than the first runs only where they are
        not at their default: so earlier runs and checkpoints are known again."""
        values = self.model_dump(mode="json")
        young = ("ensemble", "uncertainty_penalty", "calibration", "fast", "precision")
        default = {name: type(self).model_fields[name].default for name in young}
        return {k: v for k, v in values.items() if k not in default or v != default[k]}

    @model_validator(mode="after")
    def _only_an_mlp_drops_units(self) -> RewardConfig:
        if self.combine == "adapter" and self.dropout > 0:
            raise ValueError(
                f"combine adapter has no hidden units to drop: set dropout to 0, not {self.dropout}"
            )
        return self

    @model_validator(mode="after")
    def _one_head_has_no_doubt(self) -> RewardConfig:
        if self.ensemble == 1 and self.uncertainty_penalty > 0:
            raise ValueError(
                f"uncertainty_penalty is {self.uncertainty_penalty}, but a single head has no uncertainty: "
                "set ensemble to 2 or more, or the penalty to 0"
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


class RewardTerm(Config):
    """One of several rewards that together rate an image: their weighted mean."""

    scorer: str
    """One of BUILT_IN_SCORERS, or a function `(**options) -> accord.reward.scorers.Scorer` as
    "package.module:function"."""
    options: dict[str, Any] = Field(default_factory=dict)
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Relative: weights are divided by their sum."""
    normalise: Normalise = "none"
    """How scores become numbers in [0, 1]. none: they are; logistic: sigmoid of the standardised score; rank:
    the share of the run's collected images that score lower. Measured once, on those images."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""
    """In tables; by default that of the scorer."""

    @property
    def title(self) -> str:
        """`name`, or the last part of the scorer's."""
        return self.name or re.split(r"[.:]", self.scorer)[-1].lower()

    @model_validator(mode="after")
    def _the_scorer_can_be_found(self) -> RewardTerm:
        if self.scorer not in BUILT_IN_SCORERS and not _OBJECT.fullmatch(self.scorer):
            raise ValueError(
                f"there is no scorer {self.scorer!r}; expected one of {', '.join(BUILT_IN_SCORERS)}, or a "
                "function as package.module:function"
            )
        unknown = sorted({*self.options} - {*TEXT_NORMALISED_OPTIONS})
        if self.scorer == "text_normalised" and unknown:
            raise ValueError(
                f"the scorer text_normalised has no option {', '.join(unknown)}; it has "
                f"{', '.join(TEXT_NORMALISED_OPTIONS)}"
            )
        return self
