"""Config of the guards. No torch here, so that reading a recipe is quick."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from accord.config import Config
from accord.prompts import Category

Action = Literal["stop", "keep_best"]
OWN_MEASURES = ("reward", "held_out", "saturation", "edge_density", "diversity", "reference_distance")
"""What is measured of every snapshot; recipes may add more."""
JUDGEMENTS = "judgements"
PlugSpec = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
MeasureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Bound(Config):
    """What a measure's mean may be: in its own unit, or as a multiple of what it was before fine-tuning."""

    least: float | None = None
    most: float | None = None
    least_ratio: float | None = Field(default=None, ge=0.0)
    most_ratio: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        pairs = ((self.least, self.most), (self.least_ratio, self.most_ratio))
        if all(end is None for pair in pairs for end in pair):
            raise ValueError("a bound needs least, most, least_ratio or most_ratio")
        for low, high in pairs:
            if low is not None and high is not None and low >= high:
                raise ValueError(f"nothing lies between {low} and {high}")
        return self


class GuardsConfig(Config):
    """When a fine-tuning counts as hacking its reward, and what is done then.

    Every so many steps the averaged weights are measured on fixed prompts and seeds. It is hacked when the
    held-out judge has turned while the training reward rises, or a bound is broken (accord.guards.rule).
    """

    every: int = Field(default=50, ge=1)
    """Steps between two measurements."""
    prompts: dict[Category, NonNegativeInt] = Field(
        default_factory=lambda: {Category.COMBINATION: 24}, validate_default=True
    )
    """How many of the grammar's seen prompts; those that are held out stay for the evaluation."""
    images_per_prompt: int = Field(default=4, ge=2)
    held_out: str = Field(default=JUDGEMENTS, pattern=r"^(judgements|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$")
    """The judge that nothing is trained on. judgements: a second reward, learned from the judged images that
    reward.validation_fraction keeps from the first. Or a function by name, "package.module:factory":
    factory() gives a callable (images_BHWC, prompts) -> one number an image, the more the better, or an
    object whose `score` is one. What does not look through the reward's own CLIP is fooled by less of what
    fools the reward."""
    measures: dict[MeasureName, PlugSpec] = Field(default_factory=dict)
    """Further measures by name, made as a held-out judge is, such as the rate of duplicated objects
    (accord.shapes.guards:too_many_objects). NaN where one does not apply to a prompt."""
    action: Action = "stop"
    """stop: training ends there. keep_best: it goes on to its last step. Either way the model handed on is
    then the one that the held-out judge liked best among those that broke no bound."""
    patience: int = Field(default=2, ge=1)
    """Measurements in a row that must find the held-out judge turned. A bound is broken at once."""
    level: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Of the interval of the held-out judge's change, paired over prompts, that must lie below 0."""
    bounds: dict[MeasureName, Bound] = Field(default_factory=dict)
    """By measure: reward, held_out, saturation, edge_density, diversity, reference_distance, or one of
    `measures`."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        taken = sorted(set(self.measures) & set(OWN_MEASURES))
        if taken:
            raise ValueError(f"measures: {', '.join(taken)} is measured anyway; give yours another name")
        known = (*OWN_MEASURES, *self.measures)
        unknown = sorted(set(self.bounds) - set(known))
        if unknown:
            raise ValueError(f"bounds: nothing measures {', '.join(unknown)}; there are {', '.join(known)}")
        distance = self.bounds.get("reference_distance")
        if distance is not None and (distance.least_ratio is not None or distance.most_ratio is not None):
            raise ValueError(
                "bounds: reference_distance is 0 before fine-tuning, so no ratio bounds it; give it most"
            )
        if sum(self.prompts.values()) < 2:
            raise ValueError("prompts: an interval over prompts needs two prompts or more")
        return self
