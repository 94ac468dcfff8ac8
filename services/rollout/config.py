"""What `python -m services.rollout` needs to know, and `accord models promote --serve`: one YAML file."""

from __future__ import annotations

from pydantic import Field, SecretStr, model_validator

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
    """Where the config of what serves is kept: in Ray Serve itself, or in the RayService on Kubernetes.

    On Kubernetes it must be the RayService: the operator tells a new head, or a new cluster, what is in it.
    """

    url: str = Field(default="", pattern=r"^(https?://.*)?$")
    """Ray Serve's REST API, of the cluster's dashboard."""
    token_file: str = ""
    """Of Ray's own token, where the cluster wants one."""
    application: str = APP_NAME
    rayservice: str = ""
    """The RayService's name, found by the pod's own account or the kubeconfig."""
    namespace: str = "accord"
    context: str = ""
    """Of the kubeconfig; empty: its current one."""

    @model_validator(mode="after")
    def _one_of_two(self) -> ServeEndpoint:
        if bool(self.url) == bool(self.rayservice):
            raise ValueError("serve needs a url (Ray Serve's REST API) or a rayservice, one of the two")
        return self


class RegistryChoice(Config):
    """The model of the registry whose aliases move with what serves."""

    url: SecretStr = SecretStr("")
    """MLflow's registry URI, or env:NAME; empty: MLFLOW_REGISTRY_URI, else SQLite in runs/."""
    model: str = Field(min_length=1)
    """Such as accord-diffusion."""


class RolloutConfig(Config):
    """All of it; times in seconds."""

    prometheus: str = Field(default="", pattern=r"^(https?://.*)?$")
    """Where the gateway's metrics are; a move by hand needs none."""
    window_s: float = Field(default=3600.0, ge=10.0)
    """Requests and verdicts of so long are compared."""
    every_s: float = Field(default=5.0, gt=0.0)
    load_timeout_s: float = Field(default=600.0, gt=0.0)
    """A model that is to serve must be loaded within this, and a move be carried out."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Where the rollout tells Prometheus of itself; 0: nowhere."""
    gateway: GrpcEndpoint
    """Its token needs the scope `generate`."""
    feedback: GrpcEndpoint | None = None
    """Its token needs the scope `feedback`. Without it no verdicts are known: see `policy.min_verdicts`."""
    serve: ServeEndpoint
    registry: RegistryChoice | None = None
    """Without it, only what serves is changed."""
    policy: RolloutPolicy = Field(default_factory=RolloutPolicy)
