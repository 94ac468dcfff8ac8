"""Configs of sampling and fine-tuning. No torch here, so that reading a recipe is quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from accord.config import Config
from accord.guards.settings import GuardsConfig

Parameters = Literal["full", "lora"]
Sharding = Literal["none", "fsdp"]
Precision = Literal["float32", "bfloat16"]
Weighting = Literal["raw", "threshold", "softmax"]
Objective = Literal[
    "reward_weighted_likelihood",
    "advantage_weighted_matching",
    "diffusion_nft",
    "diffusion_kto",
    "diffusion_dpo",
    "pretraining_only",
]

# Of FinetuneConfig: what may change between two legs of a run, say after it ran out of memory.
FREE_KEYS = frozenset(
    {
        "guards",
        "log_every",
        "checkpoint_every",
        "gradient_accumulation",
        "gradient_checkpointing",
        "compile",
        "channels_last",
        "sharding",
    }
)


class SamplerConfig(Config):
    """How prompts and seeds become images."""

    scheduler: str = "DPMSolverMultistepScheduler"
    """Class name of any scheduler in diffusers; made from the model's own scheduler config."""
    scheduler_options: dict[str, Any] = Field(default_factory=dict)
    """Constructor arguments that replace those of the model's scheduler config."""
    steps: int = Field(default=20, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0.0)
    """Classifier-free guidance; 1 or less means none (and half the work)."""
    negative_prompt: str = ""
    height: int | None = Field(default=None, ge=8)
    """Pixels; None for the size that the model was trained at."""
    width: int | None = Field(default=None, ge=8)
    precision: Precision = "float32"
    """Of the UNet's forward pass (autocast); the scheduler's arithmetic is float32 either way."""


class EngineConfig(Config):
    """How the denoising engine batches, and what bounds its memory."""

    max_batch: int = Field(default=64, ge=2)
    """UNet samples a step; a sample with guidance counts as two."""
    max_samples: int = Field(default=256, ge=1)
    """Samples held: being denoised, or waiting for the VAE. It bounds the memory."""
    max_queue: int = Field(default=1024, ge=1)
    """Samples that wait until there is room; one more is refused with EngineFull."""
    batch_sizes: tuple[int, ...] = ()
    """UNet batches are padded up to the next of these, so that shapes repeat (torch.compile, CUDA graphs; one
    size only: the same kernels for every batch). Empty: no padding."""
    compile: bool = False
    """Compiles the UNet (torch.compile) for each of batch_sizes. The first step at each size is slow."""
    decode_batch: int = Field(default=16, ge=1)
    """Most images that the VAE decodes at once."""
    decode_thread: bool | None = None
    """Decodes in a thread of its own, beside the denoising steps. None: on a GPU yes; on a CPU no, where
    the two would only take the same cores from each other."""
    text_cache: int = Field(default=4096, ge=1)
    """Encoded prompts kept for each model; the least recently used goes first."""

    @model_validator(mode="after")
    def _batches_fit(self) -> EngineConfig:
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"batch_sizes must be positive, got {list(self.batch_sizes)}")
        if self.batch_sizes and max(self.batch_sizes) < self.max_batch:
            raise ValueError(
                f"the largest of batch_sizes ({max(self.batch_sizes)}) must hold max_batch ({self.max_batch})"
            )
        if self.compile and not self.batch_sizes:
            raise ValueError(
                "compile needs batch_sizes (say 8, 16, 32, 64), or each new batch size compiles again"
            )
        return self


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021): what is trained where finetune.parameters is lora."""

    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=32, ge=1)
    """The adapters count alpha / rank times."""
    target_modules: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Names, or ends of names, of linear and convolution layers; by default those of all attention. For more
    room: proj_in, proj_out, ff.net.0.proj, ff.net.2, conv1, conv2 too."""


class FinetuneConfig(Config):
    """How a model is fine-tuned. The paper states 10,000 steps of AdamW on batches of 256 + 256, but neither
    its beta nor its learning rate."""

    objective: Objective = "reward_weighted_likelihood"
    """reward_weighted_likelihood: Eq. 2, the paper's. advantage_weighted_matching and diffusion_nft replace
    its first term by a signed one (accord.diffusion.objectives). diffusion_kto learns from what people called
    good and bad, and diffusion_dpo from pairs of which they preferred one image, both without the reward.
    pretraining_only: the second term of Eq. 2 alone, the control of every comparison."""
    images: Literal["all", "labelled"] = "all"
    """labelled: only images that people judged; all: those too that only the reward has scored.
    (diffusion_kto and diffusion_dpo take the images of which people said something, either way.)"""
    steps: int = Field(default=10_000, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0.0)
    batch_size: int = Field(default=256, ge=1)
    """Generated images a step, over all workers."""
    pretraining_batch_size: int = Field(default=256, ge=0)
    """Pre-training images a step, over all workers."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Parts that a worker's share of the batch is computed in; saves memory and changes nothing else."""
    beta: float = Field(default=1.0, ge=0.0)
    """Weight of the pre-training term in Eq. 2."""
    weighting: Weighting = "raw"
    threshold: float = 0.5
    """weighting: threshold keeps the images whose reward is at least this, each with weight 1."""
    temperature: float = Field(default=1.0, gt=0.0)
    """weighting: softmax over the data set of reward / temperature, scaled to mean 1."""
    per_prompt: bool = False
    """Scales the weights of each prompt's images to mean 1; without, an easy prompt counts more."""
    advantage_clip: float = Field(default=2.0, gt=0.0)
    """advantage_weighted_matching and diffusion_nft: largest advantage, in standard deviations of the reward
    about the mean of its prompt."""
    anchor: float = Field(default=3.0, ge=0.0)
    """advantage_weighted_matching: weight of the distance to the reference model."""
    nft_strength: float = Field(default=1.0, gt=0.0)
    """diffusion_nft: b, of the implicit policies; the lower, the further the model goes."""
    kto_beta: float = Field(default=1000.0, gt=0.0)
    """diffusion_kto: how soon an image counts as learned; the higher, the nearer to the reference model."""
    kto_good_weight: float = Field(default=1.0, gt=0.0)
    """diffusion_kto: weight of the loss of images that people called good."""
    kto_bad_weight: float = Field(default=1.0, gt=0.0)
    """diffusion_kto: ... and of those that they called bad; above kto_good_weight is aversion to losses."""
    kto_good_share: float = Field(default=0.8, gt=0.0, lt=1.0)
    """diffusion_kto: share of good images among those drawn, whatever their share among the judged ones."""
    dpo_beta: float = Field(default=2000.0, gt=0.0)
    """diffusion_dpo: the higher, the nearer to the reference model; the paper has 2000 for Stable Diffusion
    1.5 and 5000 for SDXL."""
    timestep_power: float = Field(default=1.0, gt=0.0)
    """Timesteps are T * u**(1 / power), u uniform: 1 is uniform, more draws towards high noise."""
    condition_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of samples trained without their prompt, so that guidance goes on working."""
    pretraining_condition_dropout: float | None = Field(default=None, ge=0.0, le=1.0)
    """The same share among pre-training images; None: as among the generated ones. 1 keeps images natural
    without teaching the errors of the captions again."""
    pretraining_threshold: float | None = None
    """Only pre-training images whose reward for their own caption is at least this: what people said about
    generated images then mends careless captions too. It is the learned reward's, also where the recipe has
    several rewards. None takes all, as in the paper."""
    pretraining_favourites: bool = False
    """... and only if the reward prefers the caption to each prompt that differs from it in one word. All
    captions must then be prompts of the recipe's grammar."""
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the averaged weights, which are what a run hands on; 0 for no averaging."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    precision: Precision = "float32"
    """bfloat16: the networks compute in it; the weights that are trained, their gradients, the optimiser and
    the average stay float32."""
    parameters: Parameters = "full"
    """full: the whole UNet; lora: small adapters in a frozen one, which take a fraction of the memory."""
    lora: LoraConfig = LoraConfig()
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass rather than keeping them: less memory, a third more
    time."""
    compile: bool = False
    """Compiles the transformer blocks (torch.compile): a minute or so before the first step, then faster."""
    channels_last: bool = False
    """Keeps convolutions' weights in the order that GPUs read fastest in bfloat16."""
    sharding: Sharding = "none"
    """fsdp: several workers hold a part each of weights, gradients and optimiser state (FSDP2), for models
    that do not fit one GPU. none: each holds all of it (DDP)."""
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    guards: GuardsConfig | None = None
    """What watches the training for reward hacking, and ends it; null: nothing does."""

    @property
    def is_preference(self) -> bool:
        """Whether it learns from people's judgements themselves, and not from the reward."""
        return self.objective in ("diffusion_kto", "diffusion_dpo")

    def decisive(self) -> dict[str, Any]:
        """What the trained weights depend on, as plain values: all but when it reports and saves, and in how
        many parts and where a batch is computed."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE_KEYS}

    @model_validator(mode="after")
    def _terms_have_images(self) -> FinetuneConfig:
        if self.objective == "pretraining_only" and (self.pretraining_batch_size == 0 or self.beta == 0):
            raise ValueError(
                "objective pretraining_only learns from pre-training images alone, so both must be above 0: "
                f"pretraining_batch_size is {self.pretraining_batch_size}, beta is {self.beta}"
            )
        if self.objective == "advantage_weighted_matching" and self.anchor <= self.advantage_clip:
            raise ValueError(
                f"objective advantage_weighted_matching has no minimum unless anchor ({self.anchor}) is "
                f"above advantage_clip ({self.advantage_clip}): raise the one or lower the other"
            )
        if self.objective == "diffusion_dpo" and self.batch_size % 2:
            raise ValueError(
                f"objective diffusion_dpo learns from pairs of images, so batch_size must be even; it is "
                f"{self.batch_size}"
            )
        if self.pretraining_favourites and self.pretraining_threshold is None:
            raise ValueError(
                "pretraining_favourites chooses among captions by their reward: give pretraining_threshold "
                "too (0 for no other condition)"
            )
        if self.channels_last and self.sharding == "fsdp":
            raise ValueError("sharding fsdp needs weights in their usual order: set channels_last to false")
        if not all(0.0 <= beta < 1.0 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must lie in [0, 1), got {self.adam_betas}")
        return self
