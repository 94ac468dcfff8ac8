"""What is known of the two models: requests from Prometheus, verdicts from the feedback service."""

from __future__ import annotations

import datetime
import json
import math
import urllib.parse
import urllib.request
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from accord.client import TLS, Client
from accord.client.connection import Endpoint
from accord.errors import AccordError
from accord.registry.gate import DIFFUSION
from accord.registry.rollout import Observed
from accord.v1 import feedback_pb2, feedback_pb2_grpc
from services.rollout.config import GrpcEndpoint

TIMEOUT_S = 10.0
MODEL_DIGITS = 12
"""Of a digest, in the gateway's metrics (services.metrics)."""


class SourceError(AccordError):
    """Something that the rollout asks does not answer, or not as expected. It asks again."""


class Prometheus:
    """Prometheus' HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def requests(self, role: str, digest: str, window_s: float) -> Observed:
        """Of a model in a role, over the last `window_s` seconds.

        Raises:
            SourceError: it does not answer.
        """
        found = {
            labels.get("outcome", ""): value
            for labels, value in self._query(count_query(role, digest, window_s))
        }
        latency = [value for _, value in self._query(latency_query(role, digest, window_s))]
        seconds = latency[0] if latency and math.isfinite(latency[0]) else None
        return Observed(round(found.get("ok", 0.0)), round(found.get("error", 0.0)), seconds)

    def _query(self, query: str) -> list[tuple[dict[str, str], float]]:
        address = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
                body: Any = json.load(response)
            return [(one["metric"], float(one["value"][1])) for one in body["data"]["result"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"Prometheus at {self._url} does not answer as expected: {error}") from None


def count_query(role: str, digest: str, window_s: float) -> str:
    """Requests by outcome. Not `increase`, which misses what a series begins with: a canary's first errors.

    A series is of one process (its label WorkerId), and so never falls.
    """
    series, window = _series("ray_accord_model_requests_total", role, digest), f"{window_s:.0f}s"
    now = f"max_over_time({series}[{window}])"
    return f"sum by (outcome) (clamp_min({now} - ({series} offset {window} or 0 * {now}), 0))"


def latency_query(role: str, digest: str, window_s: float) -> str:
    """The 95th percentile in seconds."""
    series = _series("ray_accord_model_request_seconds_bucket", role, digest)
    return f"histogram_quantile(0.95, sum by (le) (rate({series}[{window_s:.0f}s])))"


def _series(name: str, role: str, digest: str) -> str:
    return f'{name}{{role="{role}",model="{digest[:MODEL_DIGITS]}"}}'


class Gateway:
    """The gateway, asked which models are loaded."""

    def __init__(self, where: GrpcEndpoint) -> None:
        """Raises AccordError: a file cannot be read."""
        self._client = Client(where.url, token_file=where.token_file, tls=_tls(where))

    def digests(self) -> dict[str, str]:
        """alias -> digest of the diffusion models. Raises ClientError."""
        return self.models(DIFFUSION)

    def models(self, kind: str) -> dict[str, str]:
        """alias -> digest of the loaded models of a kind. Raises ClientError."""
        return {one.alias: one.digest for one in self._client.models() if one.kind == kind}

    def default(self, kind: str) -> str:
        """The alias of the default of a kind; empty while none is loaded. Raises ClientError."""
        found = [one.alias for one in self._client.models() if one.kind == kind and one.is_default]
        return found[0] if found else ""

    def close(self) -> None:
        self._client.close()


class Feedback:
    """The feedback service, asked what people say of served images."""

    def __init__(self, where: GrpcEndpoint) -> None:
        """Raises AccordError: a file cannot be read."""
        self._endpoint = Endpoint.find(where.url, token_file=where.token_file, tls=_tls(where))
        self._channel = self._endpoint.channel(aio=False)
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(self._channel)

    def add_verdicts(self, seen: dict[str, Observed], window_s: float) -> dict[str, Observed]:
        """By digest, with the verdicts of the last `window_s` seconds.

        Raises:
            SourceError: it does not answer.
        """
        begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=window_s)
        since = Timestamp()
        since.FromDatetime(begin)
        try:
            reply = self._stub.CountServedVerdicts(
                feedback_pb2.CountServedVerdictsRequest(since=since),
                metadata=self._endpoint.metadata(),
                timeout=TIMEOUT_S,
            )
        except grpc.RpcError as error:
            code: Any = error.code()
            raise SourceError(
                f"the feedback service at {self._endpoint.target} does not count verdicts ({code.name}): "
                f"{error.details()}"
            ) from None
        counts = {one.model_digest: one for one in reply.models}
        return {
            digest: replace(one, good=counts[digest].good, bad=counts[digest].bad)
            if digest in counts
            else one
            for digest, one in seen.items()
        }

    def close(self) -> None:
        self._channel.close()


def _tls(where: GrpcEndpoint) -> TLS | None:
    return TLS(ca_file=where.ca_file) if where.ca_file else None
