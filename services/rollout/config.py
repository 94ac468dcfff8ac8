"""What `python -m services.rollout` needs to know: one YAML file."""

from __future__ import annotations

from pydantic import Field, SecretStr

from accord.config import Config
from accord.registry.rollout import RolloutPolicy
from services.config import APP_NAME


class GrpcEndpoint(Config):
    """Where a service answers, and as whom it is asked."""

    url: str = Field(min_length=1)
    """HOST:PORT, or grpcs://HOST:PORT for TLS."""
    token_file: str
    ca_file: str = ""
    """PEM of the authorities to trust; empty: the public ones."""


class ServeEndpoint(Config):
    """Ray Serve's REST API, of the cluster's dashboard."""

    url: str = Field(pattern=r"^https?://")
    token_file: str = ""
    """Of Ray's own token, where the cluster wants one."""
    application: str = APP_NAME


class RegistryChoice(Config):
    """The model of the registry whose aliases move with what serves."""

    url: SecretStr = SecretStr("")
    """MLflow's registry URI, or env:NAME; empty: MLFLOW_REGISTRY_URI, else SQLite in runs/."""
    model: str = Field(min_length=1)
    """Such as accord-diffusion."""


class RolloutConfig(Config):
    """All of it; times in seconds."""

    prometheus: str = Field(pattern=r"^https?://")
    window_s: float = Field(default=3600.0, ge=10.0)
    """Requests and verdicts of so long are compared."""
    every_s: float = Field(default=5.0, gt=0.0)
    gateway: GrpcEndpoint
    """Its token needs the scope `generate`."""
    feedback: GrpcEndpoint | None = None
    """Its token needs the scope `feedback`. Without it no verdicts are known: see `policy.min_verdicts`."""
    serve: ServeEndpoint
    registry: RegistryChoice | None = None
    """Without it, only what serves is changed."""
    policy: RolloutPolicy = Field(default_factory=RolloutPolicy)
