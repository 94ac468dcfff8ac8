"""The recipe's `evaluate` section: what is generated and judged to compare the models."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from accord.config import Config
from accord.diffusion.settings import SamplerConfig
from accord.prompts import Category, PromptPlan, Split

SECOND_REWARDS = ("clip", "reward_no_auxiliary")
"""What every evaluation measures beside the reward itself."""

PromptCounts = dict[Split, dict[Category, NonNegativeInt]]
"""How many prompts of each split and category, e.g. `{seen: {count: 9, colour: 9}}`."""


def prompt_plans(prompts: Mapping[Split, Mapping[Category, int]]) -> list[PromptPlan]:
    """One plan a split, in the order of `Split`, whatever the order in the recipe."""
    return [PromptPlan(split=split, per_category=dict(prompts[split])) for split in Split if split in prompts]


def _prompts(per_category: int) -> PromptCounts:
    return {split: dict.fromkeys(Category, per_category) for split in Split}


class ChoiceConfig(Config):
    """Prompts and seeds on which each model's guidance scale is chosen, and the frontier drawn; no claim
    is made on them. Every model generates them at every guidance scale."""

    prompts: PromptCounts = Field(default_factory=lambda: _prompts(3))
    images_per_prompt: PositiveInt = 4


class TestConfig(Config):
    """Prompts and seeds on which the claims are made, at each model's own guidance scale.

    The paper's protocol: sets of four images, nine raters, a win is at least seven votes of nine.
    """

    __test__ = False  # a config, not a test case: pytest must not collect it

    prompts: PromptCounts = Field(default_factory=lambda: _prompts(9))
    images_per_prompt: PositiveInt = 4
    raters: PositiveInt = 9
    quorum: PositiveInt = 7

    @model_validator(mode="after")
    def _quorum_is_a_majority(self) -> Self:
        if not self.raters / 2 < self.quorum <= self.raters:
            raise ValueError(
                f"quorum is {self.quorum}: of {self.raters} raters it must be more than half, and at most all"
            )
        return self


class BestOfConfig(Config):
    """Prompts with many candidates each, ranked by the reward."""

    prompts: PromptCounts = Field(default_factory=lambda: _prompts(3))
    candidates: PositiveInt = 16
    sizes: tuple[PositiveInt, ...] = (1, 4, 16)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if not self.sizes or max(self.sizes) > self.candidates:
            raise ValueError(f"sizes are {self.sizes}: each must be at most candidates ({self.candidates})")
        return self


class EvaluateConfig(Config):
    """The `evaluate` section of a recipe.

    `sampler.guidance_scale` is replaced by each of `guidance_scales`.
    """

    reserved_prompts: Literal["any", "none", "only"] = "any"
    """A fixed third of the grammar's prompts is reserved for confirmation. A study whose choices are still
    open takes "none" of them; what confirms its winner takes them "only"."""
    guidance_scales: tuple[PositiveFloat, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
    choice: ChoiceConfig = ChoiceConfig()
    test: TestConfig = TestConfig()
    best_of: BestOfConfig = BestOfConfig()
    sampler: SamplerConfig = SamplerConfig()
    batch_size: PositiveInt = 32
    second_reward: str = "clip"
    """A reward that fine-tuning was not given, whose change tells a better model from a reward that is merely
    pleased: "clip" (the similarity by the recipe's CLIP, learned from no judgement), "reward_no_auxiliary",
    or the directory of a reward model or of another CLIP, such as that of another run."""
    bootstrap_resamples: int = Field(default=1000, ge=100)
    confidence_level: float = Field(default=0.95, gt=0.0, lt=1.0)
    calibration_bins: PositiveInt = 10

    @field_validator("second_reward")
    @classmethod
    def _second_reward_is_another(cls, name: str) -> str:
        if name in ("", "reward"):
            raise ValueError(
                f"second_reward is {name!r}: expected {', '.join(SECOND_REWARDS)} or a directory, and not "
                "the reward that is trained on"
            )
        return name

    @field_validator("guidance_scales")
    @classmethod
    def _scales_are_distinct(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or len(set(scales)) != len(scales):
            raise ValueError(f"guidance_scales are {scales}: at least one is needed, and none twice")
        return tuple(sorted(scales))
