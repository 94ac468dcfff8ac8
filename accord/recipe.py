"""A recipe: everything that makes a run what it is, in one YAML file, a section for each component."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, SecretStr, model_validator

from accord.config import Config, environment_value, load_yaml
from accord.diffusion.settings import FinetuneConfig, SamplerConfig
from accord.errors import ConfigError, PromptError
from accord.evaluation.config import EvaluateConfig
from accord.evaluation.plan import draw_prompts
from accord.guards.settings import JUDGEMENTS
from accord.prompts import Category, Grammar, PromptPlan, Split, load_grammar
from accord.registry.settings import RegistryConfig
from accord.reward.settings import BUILT_IN_SCORERS, RewardConfig, RewardTerm

ObjectSpec = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
"""A Python object by name, "package.module:attribute"."""


class SourceConfig(Config):
    """Captioned images, made by a function `(count, seed, **options)`; see accord.captions."""

    source: ObjectSpec
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the source."""
    count: PositiveInt


class CollectPart(Config):
    """Prompts of the seen split (the others are held out of all feedback), and how many images of each."""

    prompts: dict[Category, NonNegativeInt]
    images_per_prompt: dict[Category, PositiveInt]

    @property
    def plan(self) -> PromptPlan:
        """Which prompts to draw."""
        return PromptPlan(split=Split.SEEN, per_category=self.prompts)

    @model_validator(mode="after")
    def _each_category_has_images(self) -> Self:
        lacking = [str(name) for name, n in self.prompts.items() if n and name not in self.images_per_prompt]
        if lacking:
            raise ValueError(f"prompts has {', '.join(lacking)}, for which images_per_prompt says nothing")
        return self


class CollectConfig(Config):
    """The images of stage 1: those that are judged, and more that only the reward scores."""

    labelled: CollectPart
    unlabelled: CollectPart = CollectPart(prompts={}, images_per_prompt={})
    sampler: SamplerConfig = SamplerConfig()
    batch_size: PositiveInt = 32
    """Images sampled together; part of what determines their exact pixels."""


class OnPolicyConfig(Config):
    """Further rounds of fine-tuning, each on images of the model as it is by then, scored by the reward.

    The paper has none: it draws all images from the model before fine-tuning.
    """

    rounds: NonNegativeInt = 0
    """After the first; each takes finetune.steps."""
    images: CollectPart = CollectPart(prompts={}, images_per_prompt={})
    """What is drawn in each round, with collect.sampler."""

    @model_validator(mode="after")
    def _rounds_have_images(self) -> Self:
        if self.rounds and not any(self.images.prompts.values()):
            raise ValueError(f"rounds is {self.rounds}, so images must name prompts to draw in each of them")
        return self


class FeedbackConfig(Config):
    """Who judges how often, and where the judgements are kept."""

    url: SecretStr | None = None
    """SQLAlchemy URL, or "env:NAME" to read it from there; by default SQLite in the run directory."""
    judgements_per_image: PositiveInt = 1
    aggregation: Literal["majority", "weighted"] = "majority"
    """How votes become a label: all count the same, or by their rater's estimated reliability."""
    serve: bool = False
    """Whether the feedback service runs beside `judge`: the panel's raters rate over gRPC, several at once; a
    person in the browser. Without it the panel is asked directly, and people judge elsewhere."""
    rater: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "me"
    """With `serve` and no panel: the name under which the person at the keyboard judges."""
    comparisons: tuple[str, ...] = ()
    """Ids of campaigns of comparisons, imported ones for example, that the snapshot holds too; those of the
    run's own judged images are always in it. finetune.objective: diffusion_dpo learns from them."""


class RayConfig(Config):
    """How the work is spread. None of this changes a result."""

    local: bool = False
    """Everything in this process, without Ray: for small runs, such as the arms of a study."""
    num_cpus: PositiveInt | None = None
    """Of a Ray that is started on this machine; by default all. A cluster knows its own."""
    num_workers: PositiveInt = 1
    """Training workers."""
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: NonNegativeInt = 0
    threads_per_worker: PositiveInt = 1
    generators: PositiveInt = 1
    """Actors that generate images."""
    cpus_per_generator: Annotated[float, Field(gt=0)] = 1
    gpus_per_generator: NonNegativeFloat = 0
    threads_per_generator: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a training is restarted after a worker died; -1 without end. Nodes that are called back (spot
    instances) do not count."""
    min_workers: PositiveInt | None = None
    """A training goes on with as few workers as this when nodes are lost, and with up to num_workers again
    when they are back; null: with num_workers only."""
    background_checkpoints: bool | None = None
    """Whether training goes on while a checkpoint is written, from a copy in the host's memory; null: where
    it runs on GPUs."""

    @model_validator(mode="after")
    def _fewest_are_not_most(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers ({self.min_workers}) must not be above num_workers ({self.num_workers})"
            )
        return self


class TrackingConfig(Config):
    """Where MLflow keeps the trainings' parameters and metrics."""

    uri: SecretStr | None = None
    """MLflow tracking URI, or "env:NAME"; by default SQLite in the run directory; "" tracks nothing."""
    experiment: str = "accord"


class Recipe(Config):
    """A run of the method: collect, judge, learn the reward, fine-tune, evaluate."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    run_dir: Path
    grammar: str
    """Name of a shipped grammar, or the path of a YAML file."""
    model: str
    """Directory of the base model in the format of diffusers' StableDiffusionPipeline or
    StableDiffusionXLPipeline (a path or pkg://...)."""
    clip: str
    """Directory of an open_clip model, "open_clip:ARCHITECTURE/path/to/weights.safetensors", or
    "hub:OWNER/NAME" where ACCORD_ALLOW_HUB=1."""
    evaluator: ObjectSpec | None = None
    """Factory of an accord.evaluation.protocols.Evaluator; null: `evaluate` cannot run."""
    panel: ObjectSpec | None = None
    """Factory of an accord.evaluation.protocols.Panel, the simulated raters; null: people judge."""
    pretraining: SourceConfig
    """Captioned images of the kind that the base model learned from (the second term of Eq. 2)."""
    reference: SourceConfig | None = None
    """Held-out real images: what generated ones are compared with for fidelity."""
    collect: CollectConfig
    feedback: FeedbackConfig = FeedbackConfig()
    reward: RewardConfig = RewardConfig()
    rewards: tuple[RewardTerm, ...] = ()
    """What images are weighted and ranked by: the weighted mean of these; by default the learned reward
    alone."""
    finetune: FinetuneConfig = FinetuneConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    control: bool = True
    """Whether a control is trained and evaluated too, on the pre-training term alone."""
    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _preferences_are_of_people(self) -> Self:
        if self.finetune.is_preference and self.on_policy.rounds:
            raise ValueError(
                f"finetune.objective {self.finetune.objective} learns from what people said, and nobody "
                f"judges images of further rounds: on_policy.rounds is {self.on_policy.rounds}; expected 0"
            )
        return self

    @model_validator(mode="after")
    def _one_person_has_one_vote(self) -> Self:
        if self.feedback.serve and self.panel is None and self.feedback.judgements_per_image > 1:
            raise ValueError(
                "with feedback.serve and no panel one person judges, each image once: "
                f"feedback.judgements_per_image is {self.feedback.judgements_per_image}; expected 1"
            )
        return self

    @model_validator(mode="after")
    def _a_held_out_judge_has_judgements(self) -> Self:
        guards = self.finetune.guards
        if guards is not None and guards.held_out == JUDGEMENTS and self.reward.validation_fraction == 0:
            raise ValueError(
                "finetune.guards.held_out is judgements: those that reward.validation_fraction keeps from "
                "the reward, which is 0; set it above 0, or name another judge"
            )
        if guards is not None and guards.held_out == JUDGEMENTS and self.finetune.is_preference:
            raise ValueError(
                f"finetune.objective {self.finetune.objective} learns from all judgements, so none are held "
                "out for finetune.guards.held_out: judgements; name another judge there"
            )
        return self

    @model_validator(mode="after")
    def _rewards_have_titles_of_their_own(self) -> Self:
        titles = [term.title for term in self.rewards]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"rewards has {', '.join(twice)} more than once: give each a name of its own")
        for term in self.rewards:
            if term.options and term.scorer in BUILT_IN_SCORERS and term.scorer != "text_normalised":
                raise ValueError(f"rewards: the scorer {term.scorer} has no options; remove them")
        return self

    def feedback_url(self, run_dir: Path) -> str:
        """The SQLAlchemy URL of the store of judgements. It may hold a password: never print it."""
        return _url(self.feedback.url, "feedback.url", run_dir / "feedback.db")

    def tracking_uri(self, run_dir: Path) -> str:
        """The MLflow tracking URI; empty for none. It may hold a password: never print it."""
        return _url(self.tracking.uri, "tracking.uri", run_dir / "mlflow.db")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are "section.key=value".

    What would stop the run later, and can be known now, is an error now.

    Raises:
        ConfigError: an unknown key, a bad value, or more prompts than the grammar has.
    """
    recipe = load_yaml(Recipe, path, overrides)
    try:
        _check_prompts(recipe, load_grammar(recipe.grammar))
    except PromptError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def _check_prompts(recipe: Recipe, grammar: Grammar) -> None:
    """Draw all prompts once; their number does not depend on the seed."""

    plans = {
        "collect.labelled": recipe.collect.labelled.plan,
        "collect.unlabelled": recipe.collect.unlabelled.plan,
        "on_policy.images": recipe.on_policy.images.plan,
    }
    if recipe.finetune.guards is not None:
        plans["finetune.guards"] = PromptPlan(per_category=recipe.finetune.guards.prompts)
    for key, plan in plans.items():
        try:
            grammar.sample(plan, recipe.seed)
        except PromptError as error:
            raise PromptError(f"{key}.prompts: {error}") from None
    draw_prompts(recipe.evaluate, grammar, recipe.seed)


def _url(configured: SecretStr | None, key: str, sqlite_file: Path) -> str:
    if configured is None:
        return f"sqlite:///{sqlite_file.resolve()}"
    return environment_value(configured.get_secret_value(), key)
