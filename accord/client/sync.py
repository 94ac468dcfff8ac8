"""The client for programs with threads or none."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from accord.client import requests, results
from accord.client.connection import TLS, Endpoint
from accord.client.errors import ClientError, ServerError, Unavailable, from_rpc
from accord.client.requests import GenerationOptions, Pair
from accord.client.results import Event, GeneratedImage, Generation, Model, Progress, Score
from accord.client.retry import Attempts, RetryPolicy
from accord.v1 import generation_pb2, generation_pb2_grpc, reward_pb2_grpc

GENERATE_TIMEOUT_S = 600.0
REPLAY_TIMEOUT_S = 120.0
SCORE_TIMEOUT_S = 120.0
LIST_TIMEOUT_S = 30.0


class Client:
    """A connection to Accord's gateway. Safe to share between threads; close it, or use it in a `with`.

    Args:
        target: HOST:PORT, or grpcs://HOST:PORT for TLS; without it, $ACCORD_ENDPOINT or localhost:9000.
        token: the bearer token; or `token_file`, a file with nothing else in it; without both, $ACCORD_TOKEN,
            or for a server on this machine the token that `accord serve` made on its first start.
        tls: True, or a `TLS` with files; without it, $ACCORD_CA_FILE switches it on.
        retry: when failed calls are tried again.

    Every method takes `timeout_s`, the deadline of the call with all its retries, and raises a `ClientError`
    (see accord.client.errors). Retries ask for the same seed under the same request id: they change nothing.
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
        self.endpoint = Endpoint.find(target, token=token, token_file=token_file, tls=tls)
        self._retry = retry or RetryPolicy()
        self._reached = False
        self._channel = self.endpoint.channel(aio=False)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._reward = reward_pb2_grpc.RewardServiceStub(self._channel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.target!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it every call that runs."""
        self._channel.close()

    def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Draw candidates, score them, and return the best.

        `on_progress` is called about five times a second. An exception of it, Ctrl-C too, stops the drawing.
        """
        if on_progress is None:
            request = generation_pb2.GenerateImagesRequest(
                request_id=request_id or requests.new_request_id(),
                spec=requests.generation_spec(prompt, options),
            )
            response = self._call(self._generation.GenerateImages, request, Attempts(self._retry, timeout_s))
            return results.read_generation(response)
        events = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, **options)
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
                elif isinstance(event, Generation):
                    return event
        raise AssertionError("a stream ends with a Generation or an error")

    def stream(
        self,
        prompt: str,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[Event, None, None]:
        """The same, told while it happens: `Accepted`, `Progress`, each `GeneratedImage`, then `Generation`.

        Close the iterator to stop the drawing. After a retry, what was told already is not told again.
        """
        request = generation_pb2.StreamImagesRequest(
            request_id=request_id or requests.new_request_id(), spec=requests.generation_spec(prompt, options)
        )
        return self._events(request, Attempts(self._retry, timeout_s))

    def score(
        self,
        pairs: Iterable[Pair],
        *,
        reward_model: str = "",
        timeout_s: float = SCORE_TIMEOUT_S,
        request_id: str | None = None,
    ) -> tuple[Score, ...]:
        """The reward of each (image, prompt), in their order, all by one model.

        An image is the bytes of a PNG, JPEG or WebP, or the path of such a file.
        """
        attempts = Attempts(self._retry, timeout_s)
        scores: list[Score] = []
        for request in requests.score_requests(pairs, reward_model, request_id or requests.new_request_id()):
            if scores:  # the model of the first part, though another may have become the default
                request.reward_model = scores[0].reward_model_digest
            scores += results.read_scores(self._call(self._reward.ScoreImages, request, attempts.again()))
        return tuple(scores)

    def replay(
        self,
        manifest: generation_pb2.ImageManifest,
        *,
        image_format: requests.FormatName = "png",
        timeout_s: float = REPLAY_TIMEOUT_S,
        request_id: str | None = None,
    ) -> GeneratedImage:
        """The image that the manifest describes, made again. ModelNotFound when its model is not loaded."""
        request = generation_pb2.ReplayImageRequest(
            request_id=request_id or requests.new_request_id(),
            manifest=manifest,
            image_format=requests.image_format(image_format),
        )
        response = self._call(self._generation.ReplayImage, request, Attempts(self._retry, timeout_s))
        return results.read_image(response.image)

    def models(self, *, timeout_s: float = LIST_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that are loaded now."""
        request = generation_pb2.ListModelsRequest()
        response = self._call(self._generation.ListModels, request, Attempts(self._retry, timeout_s))
        return results.read_models(response)

    def _call(self, method: Any, request: Any, attempts: Attempts) -> Any:
        while True:
            call = method.future(request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata())
            try:
                response = call.result()
            except grpc.RpcError as error:
                failure = self._failure(error, request)
            except BaseException:  # Ctrl-C: the server is to stop too
                call.cancel()
                raise
            else:
                self._reached = True
                return response
            time.sleep(attempts.delay_after(failure, reached=self._reached))

    def _events(
        self, request: generation_pb2.StreamImagesRequest, attempts: Attempts
    ) -> Generator[Event, None, None]:
        reader = results.StreamReader()
        while True:
            reader.restart()
            call = self._generation.StreamImages(
                request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata()
            )
            try:
                for message in call:
                    self._reached = True
                    event = reader.event(message)
                    if event is not None:
                        yield event
                    if reader.completed:
                        return
                failure: ClientError = cut_short(self.endpoint.target, request.request_id)
            except grpc.RpcError as error:
                failure = self._failure(error, request)
            finally:
                call.cancel()
            time.sleep(attempts.delay_after(failure, reached=self._reached))

    def _failure(self, error: Any, request: Any) -> ClientError:
        failure = describe(error, self.endpoint, request)
        self._reached = self._reached or not getattr(failure, "never_connected", False)
        return failure


def describe(error: Any, endpoint: Endpoint, request: Any) -> ClientError:
    """The exception for a failed call of `request`."""
    if not callable(getattr(error, "code", None)):  # grpc raises bare RpcErrors for a channel that was closed
        return ServerError(f"the call could not be made: {error}")
    return from_rpc(
        error,
        target=endpoint.target,
        request_id=getattr(request, "request_id", ""),
        has_token=endpoint.token is not None,
        secure=endpoint.tls is not None,
    )


def cut_short(target: str, request_id: str) -> Unavailable:
    """The exception for a stream that ended well without its last message."""
    return Unavailable(f"{target} ended the stream before its last message", code="OK", request_id=request_id)
