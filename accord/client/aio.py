"""The client for asyncio."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from accord.client import requests, results
from accord.client.connection import TLS, Endpoint
from accord.client.errors import ClientError
from accord.client.requests import GenerationOptions, Pair
from accord.client.results import Event, GeneratedImage, Generation, Model, Progress, Score
from accord.client.retry import Attempts, RetryPolicy
from accord.client.sync import (
    GENERATE_TIMEOUT_S,
    LIST_TIMEOUT_S,
    REPLAY_TIMEOUT_S,
    SCORE_TIMEOUT_S,
    cut_short,
    describe,
)
from accord.v1 import generation_pb2, generation_pb2_grpc, reward_pb2_grpc


class AsyncClient:
    """The same as `Client`, for asyncio: its arguments, methods and errors are those of accord.client.Client.

    Cancelling the task that awaits a call stops the drawing.
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
        self._channel = self.endpoint.channel(aio=True)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._reward = reward_pb2_grpc.RewardServiceStub(self._channel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.target!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and with it every call that runs."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], Awaitable[None] | None] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """See `Client.generate`. `on_progress` may be a function or a coroutine function."""
        if on_progress is None:
            request = generation_pb2.GenerateImagesRequest(
                request_id=request_id or requests.new_request_id(),
                spec=requests.generation_spec(prompt, options),
            )
            response = await self._call(
                self._generation.GenerateImages, request, Attempts(self._retry, timeout_s)
            )
            return results.read_generation(response)
        events = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, **options)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    told = on_progress(event)
                    if inspect.isawaitable(told):
                        await told
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
    ) -> AsyncGenerator[Event, None]:
        """See `Client.stream`. Use `contextlib.aclosing` where the loop may be left before its end."""
        request = generation_pb2.StreamImagesRequest(
            request_id=request_id or requests.new_request_id(), spec=requests.generation_spec(prompt, options)
        )
        return self._events(request, Attempts(self._retry, timeout_s))

    async def score(
        self,
        pairs: Iterable[Pair],
        *,
        reward_model: str = "",
        timeout_s: float = SCORE_TIMEOUT_S,
        request_id: str | None = None,
    ) -> tuple[Score, ...]:
        """See `Client.score`."""
        attempts = Attempts(self._retry, timeout_s)
        scores: list[Score] = []
        for request in requests.score_requests(pairs, reward_model, request_id or requests.new_request_id()):
            if scores:
                request.reward_model = scores[0].reward_model_digest
            response = await self._call(self._reward.ScoreImages, request, attempts.again())
            scores += results.read_scores(response)
        return tuple(scores)

    async def replay(
        self,
        manifest: generation_pb2.ImageManifest,
        *,
        image_format: requests.FormatName = "png",
        timeout_s: float = REPLAY_TIMEOUT_S,
        request_id: str | None = None,
    ) -> GeneratedImage:
        """See `Client.replay`."""
        request = generation_pb2.ReplayImageRequest(
            request_id=request_id or requests.new_request_id(),
            manifest=manifest,
            image_format=requests.image_format(image_format),
        )
        response = await self._call(self._generation.ReplayImage, request, Attempts(self._retry, timeout_s))
        return results.read_image(response.image)

    async def models(self, *, timeout_s: float = LIST_TIMEOUT_S) -> tuple[Model, ...]:
        """See `Client.models`."""
        request = generation_pb2.ListModelsRequest()
        response = await self._call(self._generation.ListModels, request, Attempts(self._retry, timeout_s))
        return results.read_models(response)

    async def _call(self, method: Any, request: Any, attempts: Attempts) -> Any:
        while True:
            try:
                response = await method(
                    request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata()
                )
            except grpc.RpcError as error:
                failure = self._failure(error, request)
            else:
                self._reached = True
                return response
            await asyncio.sleep(attempts.delay_after(failure, reached=self._reached))

    async def _events(
        self, request: generation_pb2.StreamImagesRequest, attempts: Attempts
    ) -> AsyncGenerator[Event, None]:
        reader = results.StreamReader()
        while True:
            reader.restart()
            call: Any = self._generation.StreamImages(
                request, timeout=attempts.remaining_s(), metadata=self.endpoint.metadata()
            )
            try:
                async for message in call:
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
            await asyncio.sleep(attempts.delay_after(failure, reached=self._reached))

    def _failure(self, error: Any, request: Any) -> ClientError:
        failure = describe(error, self.endpoint, request)
        self._reached = self._reached or not getattr(failure, "never_connected", False)
        return failure
