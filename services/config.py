"""The serving config: one YAML file an environment (services/environments/), frozen and checked.

Keys named `user_config` can be changed while all runs; the others take effect when replicas are replaced.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from accord.config import Config

APP_NAME = "accord"
GENERATION = "Generation"
REWARD = "Reward"
LIMITER = "Limiter"
GATEWAY = "Gateway"
SERVICER_FUNCTIONS = (
    "services.gateway.servicers.add_generation",
    "services.gateway.servicers.add_reward",
    "services.gateway.servicers.add_health",
)

SchedulerName = Literal[
    "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"
]


class AutoscalingSettings(Config):
    """How many replicas there are; times in seconds."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8.0, gt=0.0)
    """Calls (of one candidate, or one image to score) that a replica should have at a time."""
    upscale_delay_s: float = Field(default=10.0, ge=0.0)
    downscale_delay_s: float = Field(default=120.0, ge=0.0)
    metrics_interval_s: float = Field(default=2.0, gt=0.0)
    look_back_period_s: float = Field(default=10.0, gt=0.0)

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class DeploymentSettings(Config):
    """What Ray Serve is told of a deployment."""

    autoscaling: AutoscalingSettings = Field(default_factory=AutoscalingSettings)
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = -1
    """Calls that wait in one caller for a free replica; -1 for no limit. The gateway's own limits refuse
    earlier."""
    health_check_period_s: float = Field(default=5.0, gt=0.0)
    health_check_timeout_s: float = Field(default=30.0, gt=0.0)
    graceful_shutdown_timeout_s: float = Field(default=120.0, ge=0.0)
    """What runs on a replica that is to stop may end within this; give the pod as long."""
    graceful_shutdown_wait_loop_s: float = Field(default=0.5, gt=0.0)
    num_cpus: float = Field(default=1.0, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Deployment.options`."""
        plain = self.model_dump(
            include=set(DeploymentSettings.model_fields) - {"autoscaling", "num_cpus", "num_gpus"}
        )
        resources = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        return {
            **plain,
            "autoscaling_config": self.autoscaling.model_dump(),
            "ray_actor_options": {
                name: value for name, value in resources.items() if value or name == "num_cpus"
            },
        }


class ModelTable(Config):
    """Models by alias; an alias is what clients ask for."""

    models: dict[str, str] = Field(min_length=1)
    """Alias -> directory: a path on every node, or pkg://package/path."""
    default: str
    """Alias of the model that is used when a request names none; used only once it is loaded."""

    @model_validator(mode="after")
    def _default_is_there(self) -> ModelTable:
        if self.default not in self.models:
            raise ValueError(f"the default {self.default!r} is none of the models: {', '.join(self.models)}")
        return self


class EngineSettings(Config):
    """How the denoising engine runs on one replica; see accord.diffusion.engine."""

    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of EngineConfig that differ from its defaults."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of torch."""
    own_process: bool | None = None
    """Runs the engine in a child process of the replica, whose interpreter Ray's threads do not share. None:
    on a CPU, where it draws a tenth more, at some 400 MB and some seconds of start."""
    retire_after_s: float = Field(default=30.0, ge=0.0)
    """How long a replaced model stays loaded for requests that began with it."""


class GenerationSettings(DeploymentSettings):
    """The deployment that draws."""

    max_ongoing_requests: int = Field(default=256, ge=1)
    """Above what the gateway admits for a replica: the engine's queue is quicker than Serve's, which
    polls."""
    engine: EngineSettings = Field(default_factory=EngineSettings)
    user_config: ModelTable


class RewardSettings(DeploymentSettings):
    """The deployment that scores."""

    max_ongoing_requests: int = Field(default=256, ge=1)
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    max_batch_size: int = Field(default=32, ge=1)
    batch_wait_s: float = Field(default=0.0, ge=0.0)
    """How long a request waits for others. With 0, those that come during a batch are the next one."""
    grammar: str = "shapes"
    """Grammar whose perturbed prompts a prompt is compared with (prompt_probability)."""
    num_prompts: int = Field(default=10, ge=2)
    """N of equation 1: the prompt and N - 1 perturbed ones."""
    retire_after_s: float = Field(default=30.0, ge=0.0)
    user_config: ModelTable
    """Of reward models; a directory may be that of a CLIP alone, whose similarity is then the reward."""


class RateLimit(Config):
    """What one token may do, and how much of the whole its share is."""

    requests_per_second: float = Field(default=50.0, gt=0.0)
    burst: int = Field(default=100, ge=1)
    concurrent_candidates: int = Field(default=512, ge=1)
    """Candidates drawn at a time."""
    concurrent_pairs: int = Field(default=1024, ge=1)
    """Images scored at a time."""
    share: float = Field(default=1.0, gt=0.0)
    """Weight when tokens compete for the capacity."""


class Limits(Config):
    """What the gateway admits. Live: part of the gateway's user_config."""

    default: RateLimit = Field(default_factory=RateLimit)
    tokens: dict[str, RateLimit] = Field(default_factory=dict)
    """Token name -> limits other than the default."""
    capacity_candidates: int = Field(default=128, ge=1)
    """Candidates that all tokens together may have at a time, running and waiting."""
    capacity_pairs: int = Field(default=1024, ge=1)
    parallel_candidates: int = Field(default=64, ge=1)
    """Candidates of one request that are drawn at a time."""
    parallel_with_accept: int = Field(default=8, ge=1)
    """The same for a request with accept_reward, so that little is drawn in vain."""
    max_candidates: int = Field(default=256, ge=1, le=256)
    max_images: int = Field(default=64, ge=1, le=64)
    max_steps: int = Field(default=150, ge=1, le=150)
    max_side_pixels: int = Field(default=1024, ge=8)
    max_pairs: int = Field(default=256, ge=1, le=256)
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_image_pixels: int = Field(default=16_000_000, ge=1)
    max_request_bytes: int = Field(default=64_000_000, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """After this a request without a time budget ends with DEADLINE_EXCEEDED."""
    max_watches: int = Field(default=16, ge=0)
    """Streams of grpc.health.v1.Health/Watch on one gateway replica."""
    max_attempts: int = Field(default=8, ge=1)
    """Tries of one call whose replica died."""


class SamplerDefaults(Config):
    """What a request that does not say otherwise is drawn with."""

    steps: int = Field(default=20, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0.0, le=30.0)
    scheduler: SchedulerName = "DPMSolverMultistepScheduler"


class CanarySettings(Config):
    """A model on trial beside the default: it answers a share of the requests that name no model."""

    model: str = Field(min_length=1)
    """Alias of a model of the generation's table. While it is not loaded, the default answers."""
    share: float = Field(ge=0.0, le=1.0)


class RecordSettings(Config):
    """Served images that are sent to the feedback service, so that clients can rate them by image_id."""

    url: str = Field(min_length=1)
    """gRPC address of the feedback service: HOST:PORT, or grpcs://HOST:PORT for TLS."""
    share: float = Field(ge=0.0, le=1.0)
    token_file: str
    """A file, on every node, with a token that has the scope `feedback`."""
    ca_file: str = ""
    """PEM of the authorities to trust; empty: the public ones."""
    queue_images: int = Field(default=64, ge=1)
    """Images of a gateway replica that may wait to be sent; what comes on top is dropped."""
    timeout_s: float = Field(default=10.0, gt=0.0)


class GatewayUserConfig(Config):
    """What can be changed while the gateway runs."""

    limits: Limits = Field(default_factory=Limits)
    sampler: SamplerDefaults = Field(default_factory=SamplerDefaults)
    canary: CanarySettings | None = None
    record: RecordSettings | None = None


class GatewaySettings(DeploymentSettings):
    """The deployment that clients reach."""

    num_cpus: float = Field(default=0.5, ge=0.0)
    max_ongoing_requests: int = Field(default=1024, ge=1)
    max_queued_requests: int = 1024
    tokens: str = ""
    """The file of hashed tokens (accord.tokens), on every node; read again when it changes. Empty: the place
    where `accord serve` and `accord token` keep it."""
    encoder_threads: int = Field(default=2, ge=1)
    user_config: GatewayUserConfig = Field(default_factory=GatewayUserConfig)


class ServeConfig(Config):
    """One environment: all that `services.app.build` needs."""

    generation: GenerationSettings
    reward: RewardSettings
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)

    @model_validator(mode="after")
    def _canary_is_there(self) -> ServeConfig:
        canary, models = self.gateway.user_config.canary, self.generation.user_config.models
        if canary is not None and canary.model not in models:
            raise ValueError(
                f"gateway.user_config.canary: {canary.model!r} is none of generation.user_config.models: "
                f"{', '.join(models)}"
            )
        return self

    @model_validator(mode="after")
    def _gateway_refuses_first(self) -> ServeConfig:
        limits = self.gateway.user_config.limits
        if limits.capacity_candidates >= self.gateway.max_ongoing_requests * max(
            1, self.gateway.autoscaling.min_replicas
        ):
            raise ValueError(
                f"gateway.user_config.limits: capacity_candidates ({limits.capacity_candidates}) must be "
                "below gateway.max_ongoing_requests times its replicas, or Serve refuses before it can"
            )
        return self
