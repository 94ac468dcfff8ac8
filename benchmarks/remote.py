"""Servers in processes of their own, and clients made of plain generated stubs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from accord.v1 import generation_pb2, generation_pb2_grpc, reward_pb2_grpc
from benchmarks.rivals import Settings
from benchmarks.traffic import Request

TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Remote:
    """A server that answers."""

    address: str
    tokens: list[str]
    """Two of Accord's; none of a rival's."""
    process_id: int

    def metadata(self, token: int = 0) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.tokens[token]}")] if self.tokens else []


@contextlib.contextmanager
def started(name: str, settings: Settings) -> Iterator[Remote]:
    """One of `benchmarks.rivals.NAMES`, during the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.rivals", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},  # of Ray's workers too
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(settings)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            errors = process.communicate()[1]
            raise SystemExit(f"{name} did not start:\n{errors[-3000:]}")
        ready = json.loads(line)
        yield Remote(ready["address"], ready["tokens"], process.pid)
    finally:
        if process.poll() is None:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


class Client:
    """Plain stubs."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.channel = grpc.insecure_channel(
            remote.address, options=[("grpc.max_receive_message_length", 256 * 2**20)]
        )
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.reward: Any = reward_pb2_grpc.RewardServiceStub(self.channel)

    def submit(self, request: Request, token: int = 0) -> Future[Any]:
        """A future of the response, or of grpc's error."""
        spec = generation_pb2.GenerationSpec(
            prompt=request.prompt,
            num_images=request.images,
            seed=request.seed,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            image_format=generation_pb2.IMAGE_FORMAT_PNG,
        )
        call = self.generation.GenerateImages.future(
            generation_pb2.GenerateImagesRequest(spec=spec),
            timeout=TIMEOUT_S,
            metadata=self.remote.metadata(token),
        )
        return as_future(call, lambda response: len(response.images) == request.images)

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Serve's proxy learns of an application a moment after it runs."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self.submit(
                    Request(0.0, "one red star", seed=1, steps=2, images=1, guidance_scale=1.0)
                ).result()
                return
            except grpc.RpcError as error:
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"the server does not answer: {error}") from None
                time.sleep(0.5)

    def close(self) -> None:
        self.channel.close()


def as_future(call: Any, check: Callable[[Any], bool]) -> Future[Any]:
    """A future of the standard library from one of grpc's."""
    future: Future[Any] = Future()

    def done(call: Any) -> None:
        error = call.exception()
        if error is not None:
            future.set_exception(error)
        elif not check(call.result()):
            future.set_exception(RuntimeError("not the number of images that was asked for"))
        else:
            future.set_result(call.result())

    call.add_done_callback(done)
    return future
