"""A real gRPC server on a real port that draws coloured squares, and plays the faults that it is told."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from accord.client import manifest_json
from accord.images import encode_png
from accord.v1 import generation_pb2, generation_pb2_grpc, reward_pb2, reward_pb2_grpc

TOKEN = "accord_test"
MODEL = "m" * 64
REWARD_MODEL = "r" * 64

# As Serve's proxy says it.
ACTOR_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: ServeReplica:accord:Gateway
\tactor_id: 3b1f
\tpid: 4242
\tip: 10.0.0.7
The actor is dead because its worker process has died."""


@dataclasses.dataclass
class Fault:
    """How one call fails. `after` is how many messages of a stream come before."""

    code: grpc.StatusCode | None
    details: str = ""
    rich: Sequence[Any] = ()
    after: int = 0


def rich_fault(code: grpc.StatusCode, message: str, reason: str, *details: Any) -> Fault:
    info = error_details_pb2.ErrorInfo(reason=reason, domain="accord")
    return Fault(code, message, (info, *details))


def retry_info(seconds: float) -> Any:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(int(seconds * 1e9))
    return info


class Faulty(generation_pb2_grpc.GenerationServiceServicer, reward_pb2_grpc.RewardServiceServicer):
    """Every call takes the next of `faults`; when there is none it succeeds."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.delay_s = 0.0
        self.asked, self.cancelled = threading.Event(), threading.Event()
        self.port = 0

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    def GenerateImages(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._fails(request, context):
            return generation_pb2.GenerateImagesResponse()
        time.sleep(self.delay_s)
        return generation_pb2.GenerateImagesResponse(
            request_id=request.request_id,
            images=sorted(images(request.spec), key=lambda image: image.rank)[: kept(request.spec)],
            summary=summary(request.spec),
        )

    def StreamImages(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(lambda: context.code() is None and self.cancelled.set())
        fault = self._next(request, context)
        for number, message in enumerate(stream(request)):
            if fault is not None and number == fault.after:
                if fault.code is not None:
                    play(fault, context)
                return
            time.sleep(self.delay_s)
            yield message

    def ReplayImage(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._fails(request, context):
            return generation_pb2.ReplayImageResponse()
        spec = generation_pb2.GenerationSpec(prompt=request.manifest.prompt, seed=request.manifest.seed)
        return generation_pb2.ReplayImageResponse(request_id=request.request_id, image=images(spec)[0])

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._fails(request, context):
            return generation_pb2.ListModelsResponse()
        models = [
            generation_pb2.Model(
                kind="MODEL_KIND_DIFFUSION",
                alias="base",
                digest=MODEL,
                is_default=True,
                load_time={"seconds": 60},
            ),
            generation_pb2.Model(kind="MODEL_KIND_REWARD", alias="reward", digest=REWARD_MODEL),
        ]
        return generation_pb2.ListModelsResponse(models=models)

    def ScoreImages(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._fails(request, context):
            return reward_pb2.ScoreImagesResponse()
        scores = [
            reward_pb2.Score(reward=0.5, clip_similarity=len(pair.image) / 100, prompt_probability=0.25)
            if pair.prompt.startswith("a ")
            else reward_pb2.Score(reward=0.5, clip_similarity=len(pair.image) / 100)
            for pair in request.pairs
        ]
        return reward_pb2.ScoreImagesResponse(
            request_id=request.request_id, scores=scores, reward_model_digest=REWARD_MODEL
        )

    def _next(self, request: Any, context: Any) -> Fault | None:
        self.requests.append(request)
        self.asked.set()
        self.metadata.append(dict(context.invocation_metadata()))
        if self.metadata[-1].get("authorization") != f"Bearer {TOKEN}":
            return rich_fault(grpc.StatusCode.UNAUTHENTICATED, "no such token", "TOKEN_INVALID")
        return self.faults.pop(0) if self.faults else None

    def _fails(self, request: Any, context: Any) -> bool:
        fault = self._next(request, context)
        if fault is not None:
            play(fault, context)
        return fault is not None


def play(fault: Fault, context: Any) -> None:
    """Like Serve: code, details and trailing metadata are set, and an empty message is returned."""
    assert fault.code is not None
    context.set_code(fault.code)
    context.set_details(fault.details)
    if fault.rich:
        status = status_pb2.Status(code=fault.code.value[0], message=fault.details)
        for detail in fault.rich:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))


def candidates(spec: Any) -> int:
    return int(max(spec.num_candidates, kept(spec)))


def kept(spec: Any) -> int:
    return int(max(1, spec.num_images))


def images(spec: Any) -> list[Any]:
    """The later the candidate, the better; its colour is its number."""
    count = candidates(spec)
    found = []
    for number in range(count):
        manifest = generation_pb2.ImageManifest(
            model_digest=MODEL, prompt=spec.prompt, seed=spec.seed, candidate=number, steps=20
        )
        square = np.full((16, 16, 3), 10 * (number + 1) % 256, np.uint8)
        found.append(
            generation_pb2.Image(
                image_id=f"image-{number}",
                data=encode_png(square, {"accord": manifest_json(manifest)}),
                mime_type="image/png",
                width=16,
                height=16,
                reward=(number + 1) / (count + 1),
                rank=count - number,
                candidate=number,
                manifest=manifest,
            )
        )
    return found


def summary(spec: Any) -> Any:
    return generation_pb2.GenerationSummary(
        finish_reason="FINISH_REASON_COMPLETED",
        candidates_done=candidates(spec),
        seed=spec.seed,
        model_digest=MODEL,
        reward_model_digest=REWARD_MODEL,
        elapsed={"seconds": 1, "nanos": 500_000_000},
    )


def stream(request: Any) -> Iterator[Any]:
    spec, count = request.spec, candidates(request.spec)
    message = generation_pb2.StreamImagesResponse
    yield message(
        accepted=generation_pb2.Accepted(
            request_id=request.request_id, seed=spec.seed, num_candidates=count, model_digest=MODEL
        )
    )
    drawn = images(spec)
    for number, image in enumerate(drawn):
        done = generation_pb2.Progress(
            steps_done=20 * (number + 1),
            steps_total=20 * count,
            candidates_done=number,
            candidates_total=count,
        )
        yield message(progress=done)
        first = generation_pb2.Image()
        first.CopyFrom(image)
        first.rank = 0
        yield message(image=first)
    best = sorted(drawn, key=lambda image: image.rank)[: kept(spec)]
    ranking = [
        generation_pb2.Ranking(image_id=image.image_id, rank=image.rank, reward=image.reward)
        for image in best
    ]
    completed = generation_pb2.Completed(
        request_id=request.request_id, ranking=ranking, summary=summary(spec)
    )
    yield message(completed=completed)


@contextlib.contextmanager
def serve(credentials: Any = None) -> Iterator[Faulty]:
    """The server on a free port of localhost."""
    servicer = Faulty()
    # As wide as Serve's proxy.
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 2**31 - 1)]
    )
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    if credentials is None:
        servicer.port = server.add_insecure_port("localhost:0")
    else:
        servicer.port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        yield servicer
    finally:
        server.stop(None).wait(60)
