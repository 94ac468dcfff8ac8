"""The client of the feedback service: says whether a served image was right."""

import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import grpc

from accord.client.connection import TLS, Endpoint
from accord.client.errors import ClientError
from accord.client.retry import Attempts, RetryPolicy
from accord.client.sync import describe
from accord.errors import ConfigError
from accord.v1 import feedback_pb2, feedback_pb2_grpc

DEFAULT_FEEDBACK_TARGET = "localhost:8081"
"""Where `accord feedback serve` listens for gRPC."""
FEEDBACK_ENDPOINT_VARIABLE = "ACCORD_FEEDBACK_ENDPOINT"
RATE_TIMEOUT_S = 30.0

VerdictName = Literal["good", "bad", "skip"]
_VERDICTS = {
    "good": feedback_pb2.VERDICT_GOOD,
    "bad": feedback_pb2.VERDICT_BAD,
    "skip": feedback_pb2.VERDICT_SKIP,
}


class FeedbackClient:
    """A connection to Accord's feedback service. Safe to share between threads; use it in a `with`.

    Args:
        target: HOST:PORT, or grpcs://HOST:PORT for TLS; without it, $ACCORD_FEEDBACK_ENDPOINT or
            localhost:8081.
        token, token_file, tls, retry: as those of `accord.client.Client`; the token needs the scope `rate`.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: TLS | bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        address = target or os.environ.get(FEEDBACK_ENDPOINT_VARIABLE) or DEFAULT_FEEDBACK_TARGET
        self.endpoint = Endpoint.find(address, token=token, token_file=token_file, tls=tls)
        self._retry = retry or RetryPolicy()
        self._reached = False
        self._channel = self.endpoint.channel(aio=False)
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def rate(
        self,
        image_id: str,
        verdict: VerdictName,
        *,
        rater: str = "client",
        timeout_s: float = RATE_TIMEOUT_S,
    ) -> bool:
        """Say whether a served image was right; False when this rater said so before.

        `rater` is a name within the token's own: letters, digits, - and _; a rater has one voice an image.

        Raises:
            NotFound: the image was not recorded: gateways record a share of what they serve.
            ConfigError: there is no such verdict.
            ClientError: the call failed, or the rater gave another verdict before.
        """
        if verdict not in _VERDICTS:
            raise ConfigError(f"unknown verdict {verdict!r}; known are: {', '.join(_VERDICTS)}")
        request = feedback_pb2.RateServedImageRequest(
            image_id=image_id, rater=rater, idempotency_key=uuid.uuid4().hex, verdict=_VERDICTS[verdict]
        )
        attempts = Attempts(self._retry, timeout_s)
        while True:
            try:
                response = self._stub.RateServedImage(
                    request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata()
                )
            except grpc.RpcError as error:
                failure: ClientError = describe(error, self.endpoint, request)
                self._reached = self._reached or not getattr(failure, "never_connected", False)
            else:
                return bool(response.counted)
            time.sleep(attempts.delay_after(failure, reached=self._reached))
