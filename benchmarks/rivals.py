"""Servers to measure, each behind GenerationService's gRPC surface on Ray Serve, in a process of its own.

    python -m benchmarks.rivals accord|locked|static < settings

locked and static only draw and encode: no tokens, no reward, no manifest. That favours them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accord.config import resolve_path
from accord.v1 import generation_pb2

NAMES = ("accord", "static", "locked")
SERVICERS = ["accord.v1.generation_pb2_grpc.add_GenerationServiceServicer_to_server"]


@dataclass(frozen=True)
class Settings:
    """Of one server."""

    model: str
    device: str = "cpu"
    threads: int = 1
    """CPU threads of torch in the process that draws."""
    wait_s: float = 1.0
    """static: how long a batch waits for more."""
    max_batch: int = 64
    """Rows of the UNet's batch."""
    capacity: int = 4096
    """accord: candidates that are admitted at a time."""
    own_process: bool = True
    """accord: the engine in a process of its own, as by default on a CPU."""
    rate: float = 100_000.0
    """accord: requests a second that one token may send."""


class Rival:
    """What both rivals share; `GenerateImages` differs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from benchmarks.local import Pipeline

        self.settings = Settings(**settings)
        torch.set_num_threads(self.settings.threads)
        self._pipeline = Pipeline(resolve_path(self.settings.model), self.settings.device)
        self._thread = ThreadPoolExecutor(1)  # one pipeline, one call at a time: the lock

    async def draw(self, specs: list[Any]) -> list[Any]:
        """Responses to requests that all have the same number of steps, as one batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._draw, specs)

    def _draw(self, specs: list[Any]) -> list[Any]:
        from accord.images import encode_png
        from benchmarks.traffic import Request

        requests = [
            Request(
                arrival_s=0.0,
                prompt=spec.prompt,
                seed=spec.seed,
                steps=spec.steps,
                images=spec.num_images,
                guidance_scale=spec.guidance_scale,
            )
            for spec in specs
        ]
        return [
            generation_pb2.GenerateImagesResponse(
                images=[
                    generation_pb2.Image(data=encode_png(image), mime_type="image/png") for image in images
                ]
            )
            for images in self._pipeline(requests)
        ]


class Locked(Rival):
    """One StableDiffusionPipeline behind a lock."""

    async def GenerateImages(self, request: Any) -> Any:  # noqa: N802 - the name is the contract's
        return (await self.draw([request.spec]))[0]


def static_class(settings: Settings) -> type[Rival]:
    """@serve.batch around the same pipeline. Its options are fixed when the class is made."""
    from ray import serve

    most = settings.max_batch // 2

    class Static(Rival):
        async def GenerateImages(self, request: Any) -> Any:  # noqa: N802
            return await self.batch(request)

        @serve.batch(max_batch_size=most, batch_wait_timeout_s=settings.wait_s)
        async def batch(self, requests: list[Any]) -> list[Any]:
            answers: dict[int, Any] = {}
            for steps in sorted({request.spec.steps for request in requests}):
                part: list[int] = []
                for number, request in enumerate(requests):
                    if request.spec.steps != steps:
                        continue
                    if sum(requests[n].spec.num_images for n in [*part, number]) > most:
                        answers |= await self._answer(requests, part)
                        part = []
                    part.append(number)
                answers |= await self._answer(requests, part)
            return [answers[number] for number in range(len(requests))]

        async def _answer(self, requests: list[Any], numbers: list[int]) -> dict[int, Any]:
            drawn = await self.draw([requests[number].spec for number in numbers])
            return dict(zip(numbers, drawn, strict=True))

    return Static


@contextlib.contextmanager
def accord_server(settings: Settings, port: int, folder: Path) -> Iterator[list[str]]:
    """Accord itself; yields two tokens."""
    from accord.tokens import add, read_secret
    from services.local import environment, serving

    limits = "gateway.user_config.limits"
    config = environment(
        None,
        [
            f"generation.engine.device={settings.device}",
            f"generation.engine.threads={settings.threads}",
            f"generation.engine.own_process={str(settings.own_process).lower()}",
            f"generation.engine.options={{max_batch: {settings.max_batch}}}",
            f"{limits}.capacity_candidates={settings.capacity}",
            f"{limits}.default={{requests_per_second: {settings.rate}, burst: 100000, "
            "concurrent_candidates: 100000}",
            f"gateway.max_ongoing_requests={2 * settings.capacity}",
            f"gateway.max_queued_requests={2 * settings.capacity}",
            f"generation.max_ongoing_requests={2 * settings.capacity}",
        ],
        model=settings.model,
    )
    secret = folder / "token"
    tokens = folder / "tokens.yaml"
    with serving(config, port=port, tokens_path=tokens, secret_path=secret):
        yield [read_secret(secret), add(tokens, "second", ["generate", "score"])]


@contextlib.contextmanager
def rival_server(name: str, settings: Settings, port: int) -> Iterator[list[str]]:
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options={"port": port, "grpc_servicer_functions": SERVICERS},
        )
        made: Any = Locked if name == "locked" else static_class(settings)
        deployment: Any = serve.deployment
        deployed = deployment(made).options(
            max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1}, name=name
        )
        serve.run(deployed.bind(asdict(settings)), name="rival")
        yield []
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Says on its output where it serves, as a line of JSON, and serves until its input ends."""
    name, replies = sys.argv[1], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not come between
    settings = Settings(**json.loads(sys.stdin.readline()))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        if name == "accord":
            server = accord_server(settings, port, Path(folder))
        else:
            server = rival_server(name, settings, port)
        with server as tokens:
            ready = {"address": f"127.0.0.1:{port}", "tokens": tokens}
            print(json.dumps(ready), file=replies, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
