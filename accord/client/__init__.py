"""The client: scored generations over gRPC, from Python, sync and async.

    from accord.client import Client

    with Client() as client:
        best = client.generate("two red stars on grass", num_images=4, candidates=16).images[0]
        best.save("best.png")

Of all of `accord`, this package and the generated stubs alone import grpc.
"""

from accord.client.aio import AsyncClient
from accord.client.connection import TLS, Endpoint
from accord.client.errors import (
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    PermissionDenied,
    ServerError,
    Unauthenticated,
    Unavailable,
    UntrustedCertificate,
    Violation,
)
from accord.client.feedback import FeedbackClient, GoldImage, Preferences, RatingTask, SetComparison
from accord.client.requests import GenerationOptions
from accord.client.results import (
    Accepted,
    GeneratedImage,
    Generation,
    Model,
    Progress,
    Score,
    Summary,
    manifest_from_json,
    manifest_from_png,
    manifest_json,
)
from accord.client.retry import RetryPolicy
from accord.client.sync import Client

__all__ = [
    "TLS",
    "Accepted",
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "Endpoint",
    "FeedbackClient",
    "GeneratedImage",
    "Generation",
    "GenerationOptions",
    "GoldImage",
    "InvalidRequest",
    "Model",
    "ModelNotFound",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Preferences",
    "Progress",
    "RatingTask",
    "RetryPolicy",
    "Score",
    "ServerError",
    "SetComparison",
    "Summary",
    "Unauthenticated",
    "Unavailable",
    "UntrustedCertificate",
    "Violation",
    "manifest_from_json",
    "manifest_from_png",
    "manifest_json",
]
