"""What tests hold of the deployment under test: plain generated stubs, and questions about its inside."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from accord.images import decode_image
from accord.v1 import generation_pb2 as pb
from accord.v1 import generation_pb2_grpc, reward_pb2_grpc

PROMPT = "two red stars"
OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20)]
TIMEOUT_S = 120.0


class Deployment:
    """A running application; `tokens` are texts by name."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        config: dict[str, Any],
        tokens: dict[str, str],
        ready: dict[str, str],
    ) -> None:
        self.process, self.config, self.tokens = process, config, tokens
        self.address, self.metrics = ready["address"], ready["metrics"]
        self._lock = threading.Lock()
        self.channel = grpc.insecure_channel(self.address, options=OPTIONS)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.reward = reward_pb2_grpc.RewardServiceStub(self.channel)

    def ask(self, question: str, argument: Any = None) -> Any:
        with self._lock:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps([question, argument]) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline())
        assert "error" not in reply, reply
        return reply["value"]

    def metadata(self, token: str = "all") -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.tokens[token]}")]

    def generate(
        self, token: str = "all", timeout: float = TIMEOUT_S, **spec: Any
    ) -> pb.GenerateImagesResponse:
        request = pb.GenerateImagesRequest(spec=make_spec(**spec))
        return self.generation.GenerateImages(request, metadata=self.metadata(token), timeout=timeout)

    def stream(self, token: str = "all", **spec: Any) -> Any:
        request = pb.StreamImagesRequest(spec=make_spec(**spec))
        return self.generation.StreamImages(request, metadata=self.metadata(token), timeout=TIMEOUT_S)

    @contextmanager
    def deployed(self, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """With a changed config during the block."""
        changed = json.loads(json.dumps(self.config))
        change(changed)
        self.ask("deploy", changed)
        try:
            yield
        finally:
            self.ask("deploy", self.config)
            self.ask("settled")


def make_spec(
    prompt: str = PROMPT, steps: int = 4, guidance_scale: float = 1.0, **spec: Any
) -> pb.GenerationSpec:
    return pb.GenerationSpec(prompt=prompt, steps=steps, guidance_scale=guidance_scale, **spec)


def same_pixels(one: pb.Image, other: pb.Image) -> bool:
    """Equal within 1/255: what shares a batch may change the last bit."""
    first, second = (decode_image(image.data).astype(int) for image in (one, other))
    return first.shape == second.shape and int(abs(first - second).max()) <= 1


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The details of a rich status by their name; every one of ours has an ErrorInfo, and leaks nothing."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.DESCRIPTOR.name] = message
    assert found["ErrorInfo"].domain == "accord"
    assert found["ErrorInfo"].metadata["request_id"]
    assert "Traceback" not in str(error.details())
    assert ".py" not in str(error.details())
    return found


def reason(error: grpc.RpcError) -> str:
    return str(details(error)["ErrorInfo"].reason)


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
    """Polls until the condition holds, and gives its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
    return value
