"""What the feedback service needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from accord.config import Config

Port = Annotated[int, Field(ge=0, le=65535)]


class FeedbackServiceConfig(Config):
    """Of `python -m services.feedback`. With port 0 the system chooses one, and the service says which."""

    url: str
    """The store's database: sqlite:////path/feedback.db or postgresql://user:password@host/database."""
    images: Path | str
    """Where the images are: a folder, or the URL of an object store such as s3://bucket/images."""
    state_dir: Path
    """Where the secret that signs links and sessions is kept; it is made on the first start."""
    tokens: Path | None = None
    """The token file of programs and operators; by default the one that `accord serve` uses too."""

    host: str = "127.0.0.1"
    port: Port = 8080
    grpc_port: Port = 8081
    metrics_port: Port = 9090
    public_url: str | None = None
    """How raters reach the page, e.g. https://rate.example.org; by default the address it listens on."""

    certificate: Path | None = None
    """PEM files for TLS on the gRPC port. The page's own TLS ends at a proxy before it."""
    private_key: Path | None = None

    invite_hours: float = Field(default=24 * 7, gt=0, le=24 * 366)
    """How long a link can be opened, when whoever makes it does not say."""
    session_hours: float = Field(default=24 * 7, gt=0, le=24 * 366)
    """How long a rater may go on after opening it."""
    shutdown_s: float = Field(default=10, ge=0, le=600)
    """How long answers under way may take to end when the service is stopped."""

    @property
    def site(self) -> str:
        """The address that raters use, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.public_url or f"http://{host}:{self.port}"

    @field_validator("images")
    @classmethod
    def _check_images(cls, value: Path | str) -> Path | str:
        return value if "://" in str(value) else Path(value)

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"{value!r} is no address of a site; expected e.g. https://rate.example.org")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("TLS needs both certificate and private_key; one of them is missing")
        return self
