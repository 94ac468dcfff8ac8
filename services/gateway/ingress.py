"""The application's ingress: the methods of the contract, which Serve's gRPC proxy calls by name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2

from accord.tokens import TokenFile, default_tokens_path
from accord.v1 import generation_pb2 as pb
from accord.v1 import reward_pb2
from services.config import GatewaySettings, GatewayUserConfig
from services.gateway import scoring, validation
from services.gateway.backend import Backend
from services.gateway.calls import Call, Calls, Context
from services.gateway.errors import Reason, RequestError
from services.gateway.generate import Emit, Result, Session, image_message, parallel
from services.gateway.health import Health
from services.gateway.limits import Admissions, Refusal, Resource
from services.gateway.pictures import encode
from services.gateway.recording import Recorder, Served
from services.gateway.replay import replay, within
from services.metrics import GatewayMetrics
from services.models import Catalogue

REFUSALS = {
    "RATE_LIMITED": "the token's requests come faster than its rate allows",
    "CONCURRENCY_LIMITED": "the token has as much running as it may have",
    "CAPACITY_EXHAUSTED": "all capacity is taken, or more than this token's share of it",
}


class Gateway:
    """A replica. `settings` is a dumped GatewaySettings; the others are handles of the deployments."""

    def __init__(self, generation: Any, reward: Any, limiter: Any, settings: dict[str, Any]) -> None:
        self._settings = GatewaySettings.model_validate(settings)
        self._config = self._settings.user_config
        self._metrics = GatewayMetrics()
        self._backend = Backend(generation, reward, self._metrics)
        self._calls = Calls(TokenFile.load(self._settings.tokens or default_tokens_path()), self._metrics)
        self._admissions = Admissions(limiter, self._config.limits)
        self._recorder = Recorder(self._metrics)
        self._health = Health(lambda: self._backend.ready)
        self._encoder = ThreadPoolExecutor(self._settings.encoder_threads, "images")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._config = GatewayUserConfig.model_validate(user_config)
        limits = self._config.limits
        self._calls.limits = limits
        self._admissions.configure(limits)
        self._health.max_watches = limits.max_watches
        self._backend.max_attempts = limits.max_attempts
        self._recorder.configure(self._config.record)
        self._backend.start()

    async def GenerateImages(self, data: bytes, grpc_context: Context) -> pb.GenerateImagesResponse:  # noqa: N802
        types = (pb.GenerateImagesRequest, pb.GenerateImagesResponse)
        return await self._calls.unary(
            "GenerateImages", "generate", types, data, grpc_context, self._generate_images
        )

    async def StreamImages(  # noqa: N802
        self, data: bytes, grpc_context: Context
    ) -> AsyncIterator[pb.StreamImagesResponse]:
        types = (pb.StreamImagesRequest, pb.StreamImagesResponse)
        async for event in self._calls.stream(
            "StreamImages", "generate", types, data, grpc_context, self._stream_images
        ):
            yield event

    async def ReplayImage(self, data: bytes, grpc_context: Context) -> pb.ReplayImageResponse:  # noqa: N802
        types = (pb.ReplayImageRequest, pb.ReplayImageResponse)
        return await self._calls.unary("ReplayImage", "generate", types, data, grpc_context, self._replay)

    async def ListModels(self, data: bytes, grpc_context: Context) -> pb.ListModelsResponse:  # noqa: N802
        types = (pb.ListModelsRequest, pb.ListModelsResponse)
        return await self._calls.unary("ListModels", "generate", types, data, grpc_context, self._list_models)

    async def ScoreImages(  # noqa: N802
        self, data: bytes, grpc_context: Context
    ) -> reward_pb2.ScoreImagesResponse:
        types = (reward_pb2.ScoreImagesRequest, reward_pb2.ScoreImagesResponse)
        return await self._calls.unary("ScoreImages", "score", types, data, grpc_context, self._score_images)

    async def Check(self, data: bytes, grpc_context: Context) -> health_pb2.HealthCheckResponse:  # noqa: N802
        async def check(request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
            return self._health.status(request.service)

        types = (health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse)
        return await self._calls.unary("Check", None, types, data, grpc_context, check)

    async def Watch(  # noqa: N802
        self, data: bytes, grpc_context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        def watch(
            request: health_pb2.HealthCheckRequest, call: Call
        ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
            return self._health.watch(request.service)

        types = (health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse)
        async for status in self._calls.stream("Watch", None, types, data, grpc_context, watch):
            yield status

    async def List(self, data: bytes, grpc_context: Context) -> health_pb2.HealthListResponse:  # noqa: N802
        async def list_all(
            request: health_pb2.HealthListRequest, call: Call
        ) -> health_pb2.HealthListResponse:
            return self._health.all()

        types = (health_pb2.HealthListRequest, health_pb2.HealthListResponse)
        return await self._calls.unary("List", None, types, data, grpc_context, list_all)

    async def __call__(self, request: Any) -> str:
        """What Serve's HTTP proxy gets."""
        return "This is a gRPC service; see docs/serve.md of Accord.\n"

    async def process_id(self) -> int:
        """Of this replica, for operators and for tests that kill it."""
        import os

        return os.getpid()

    async def _generate_images(
        self, request: pb.GenerateImagesRequest, call: Call
    ) -> pb.GenerateImagesResponse:
        plan = self._plan(request.spec)
        async with self._admitted(call, "candidates", parallel(plan, self._config.limits)):
            session = self._session(plan, call)
            result = await session.run()
        self._count(result)
        images = [session.image(result, one, rank) for rank, one in enumerate(result.kept, start=1)]
        self._record(session, result)
        return pb.GenerateImagesResponse(request_id=call.request_id, images=images, summary=result.summary)

    async def _stream_images(
        self, request: pb.StreamImagesRequest, call: Call
    ) -> AsyncGenerator[pb.StreamImagesResponse, None]:
        plan = self._plan(request.spec)
        queue: asyncio.Queue[pb.StreamImagesResponse | None] = asyncio.Queue()
        async with self._admitted(call, "candidates", parallel(plan, self._config.limits)):
            session = self._session(plan, call, queue.put_nowait)
            running = asyncio.create_task(session.run())
            running.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (event := await queue.get()) is not None:
                    yield event
                result = await running
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await running
        self._count(result)
        ranking = [
            pb.Ranking(image_id=one.image_id, rank=rank, reward=one.reward)
            for rank, one in enumerate(result.kept, start=1)
        ]
        self._record(session, result)
        completed = pb.Completed(request_id=call.request_id, ranking=ranking, summary=result.summary)
        yield pb.StreamImagesResponse(completed=completed)

    async def _replay(self, request: pb.ReplayImageRequest, call: Call) -> pb.ReplayImageResponse:
        limits = self._config.limits
        sampling, mime_type = validation.replay(request, limits)
        async with self._admitted(call, "candidates", 1):
            drawing = replay(self._backend, request.manifest, sampling)
            candidate, manifest = await within(limits.request_timeout_s, drawing, "ask for fewer steps")
        candidate.data = await asyncio.get_running_loop().run_in_executor(
            self._encoder, encode, candidate.pixels, mime_type, manifest
        )
        image = image_message(candidate, mime_type, manifest, 1)
        return pb.ReplayImageResponse(request_id=call.request_id, image=image)

    async def _list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        generation, reward = await self._backend.catalogues()
        return pb.ListModelsResponse(
            models=[
                *_models(generation, pb.MODEL_KIND_DIFFUSION),
                *_models(reward, pb.MODEL_KIND_REWARD),
            ]
        )

    async def _score_images(
        self, request: reward_pb2.ScoreImagesRequest, call: Call
    ) -> reward_pb2.ScoreImagesResponse:
        limits = self._config.limits
        validation.pairs(request, limits)
        async with self._admitted(call, "pairs", len(request.pairs)):
            images = await asyncio.get_running_loop().run_in_executor(
                self._encoder, validation.images, request, limits
            )
            return await scoring.score(self._backend, request, images, call.request_id, limits)

    def _plan(self, spec: pb.GenerationSpec) -> validation.Plan:
        return validation.plan(spec, self._config.limits, self._config.sampler)

    def _session(self, plan: validation.Plan, call: Call, emit: Emit | None = None) -> Session:
        limits, canary = self._config.limits, self._config.canary
        return Session(self._backend, plan, limits, self._encoder, call.request_id, emit, canary)

    @contextlib.asynccontextmanager
    async def _admitted(self, call: Call, resource: Resource, cost: int) -> AsyncIterator[None]:
        assert call.principal is not None
        async with self._admissions.admitted(call.principal.name, resource, cost) as refusal:
            if refusal is not None:
                raise _refused(refusal)
            yield

    def _record(self, session: Session, result: Result) -> None:
        for rank, candidate in enumerate(result.kept, start=1):
            if self._recorder.wants(candidate.image_id):
                image = session.image(result, candidate, rank)
                png = image.data if image.mime_type == "image/png" else b""
                self._recorder.offer(Served(image.image_id, candidate.pixels, png, image.manifest))

    def _count(self, result: Result) -> None:
        drawn = result.summary.candidates_done
        self._metrics.candidates.inc(drawn)
        if result.kept:
            self._metrics.images.inc(len(result.kept))
            self._metrics.per_image.observe(drawn / len(result.kept))
        for candidate in result.kept:
            self._metrics.rewards.observe(candidate.reward, tags={"role": result.role.value})


def _refused(refusal: Refusal) -> RequestError:
    message = f"{REFUSALS[refusal.reason]}; try again in {refusal.retry_after_s:.1f} s"
    return RequestError(Reason(refusal.reason), message, retry_after_s=refusal.retry_after_s)


def _models(catalogue: Catalogue, kind: pb.ModelKind.ValueType) -> list[pb.Model]:
    return [
        pb.Model(
            kind=kind,
            alias=model.alias,
            digest=model.digest,
            is_default=model.alias == catalogue.default,
            load_time=Timestamp(seconds=int(model.load_time)),
        )
        for model in catalogue.models
    ]
