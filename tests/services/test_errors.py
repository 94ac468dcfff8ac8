"""Every error is a status with a reason, and tells neither path nor stack trace."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from accord.images import encode_png
from accord.v1 import generation_pb2 as pb
from accord.v1 import reward_pb2
from tests.services.deployment import PROMPT, Deployment, details, eventually, reason

pytestmark = pytest.mark.cluster

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PICTURE = encode_png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"prompt": ""}, "spec.prompt"),
        ({"prompt": " \n\t"}, "spec.prompt"),
        ({"prompt": "x" * 1001}, "spec.prompt"),
        ({"negative_prompt": "x" * 1001}, "spec.negative_prompt"),
        ({"num_images": 65}, "spec.num_images"),
        ({"num_images": 4, "num_candidates": 3}, "spec.num_candidates"),
        ({"num_candidates": 257}, "spec.num_candidates"),
        ({"steps": 151}, "spec.steps"),
        ({"guidance_scale": -0.5}, "spec.guidance_scale"),
        ({"guidance_scale": math.nan}, "spec.guidance_scale"),
        ({"guidance_scale": math.inf}, "spec.guidance_scale"),
        ({"width": 63}, "spec.width"),
        ({"height": 1024}, "spec.height"),
        ({"scheduler": 77}, "spec.scheduler"),
        ({"image_format": 77}, "spec.image_format"),
        ({"accept_reward": 1.5}, "spec.accept_reward"),
        ({"accept_reward": math.nan}, "spec.accept_reward"),
        ({"time_budget": {"seconds": -1}}, "spec.time_budget"),
        ({"time_budget": {"seconds": 4000}}, "spec.time_budget"),
        ({"model": "../../etc/passwd;"}, "spec.model"),
        ({"reward_model": "a b"}, "spec.reward_model"),
    ],
)
def test_a_wrong_field_is_named(deployment: Deployment, spec: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generate(**spec)
    assert caught.value.code() == INVALID
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "FIELD_INVALID"
    assert [violation.field for violation in found["BadRequest"].field_violations] == [field]
    assert field in caught.value.details()


def test_a_stream_ends_with_the_same_errors(deployment: Deployment) -> None:
    received = []
    with pytest.raises(grpc.RpcError) as caught:
        for event in deployment.stream(prompt="", steps=999):
            received.append(event.WhichOneof("event"))
    assert received in ([], [None])  # an empty message carries the status's details
    fields = [violation.field for violation in details(caught.value)["BadRequest"].field_violations]
    assert fields == ["spec.prompt", "spec.steps"]


def test_at_most_sixteen_violations_are_told(deployment: Deployment) -> None:
    pairs = [reward_pb2.ImagePrompt(image=PICTURE, prompt=" ")] * 256
    with pytest.raises(grpc.RpcError) as caught:
        _score(deployment, pairs)
    found = details(caught.value)
    assert len(found["BadRequest"].field_violations) == 16
    assert found["ErrorInfo"].metadata["violations"] == "256"


@pytest.mark.parametrize("model", [{"model": "nobody"}, {"reward_model": "f" * 64}])
def test_a_model_that_is_not_loaded(deployment: Deployment, model: dict[str, str]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generate(**model)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "MODEL_NOT_FOUND"


def test_a_request_id_comes_back_in_errors(deployment: Deployment) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generation.GenerateImages(
            pb.GenerateImagesRequest(request_id="order:66"), metadata=deployment.metadata()
        )
    assert details(caught.value)["ErrorInfo"].metadata["request_id"] == "order:66"
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generation.GenerateImages(
            pb.GenerateImagesRequest(request_id="no spaces please"), metadata=deployment.metadata()
        )
    assert details(caught.value)["BadRequest"].field_violations[0].field == "request_id"


def test_bytes_that_are_no_message(deployment: Deployment) -> None:
    for method in ("GenerationService/GenerateImages", "RewardService/ScoreImages"):
        call = deployment.channel.unary_unary(f"/accord.v1.{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x0a\xff\xff\xff", metadata=deployment.metadata())
        assert caught.value.code() == INVALID
        assert reason(caught.value) == "REQUEST_MALFORMED"


def test_a_request_that_is_too_large(deployment: Deployment) -> None:
    call = deployment.channel.unary_unary("/accord.v1.RewardService/ScoreImages")
    with pytest.raises(grpc.RpcError) as caught:
        call(bytes(8_500_000), metadata=deployment.metadata())
    assert reason(caught.value) == "REQUEST_MALFORMED"
    with pytest.raises(grpc.RpcError) as caught:  # and grpc itself refuses what is larger by far
        call(bytes(12_000_000), metadata=deployment.metadata())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("metadata", "code", "why"),
    [
        ([], grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING"),
        ([("authorization", "Basic abc")], grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
        ([("authorization", "Bearer nonsense")], grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
        ([("authorization", "Bearer ")], grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
    ],
)
def test_nothing_is_answered_without_a_token(
    deployment: Deployment, metadata: list[tuple[str, str]], code: grpc.StatusCode, why: str
) -> None:
    stub = deployment.generation
    for call in (
        lambda: stub.GenerateImages(pb.GenerateImagesRequest(), metadata=metadata),
        lambda: list(stub.StreamImages(pb.StreamImagesRequest(), metadata=metadata)),
        lambda: stub.ReplayImage(pb.ReplayImageRequest(), metadata=metadata),
        lambda: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        lambda: deployment.reward.ScoreImages(reward_pb2.ScoreImagesRequest(), metadata=metadata),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert (caught.value.code(), reason(caught.value)) == (code, why)


def test_a_token_without_the_scope(deployment: Deployment) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generate(token="scores")
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    found = details(caught.value)["ErrorInfo"]
    assert (found.reason, found.metadata["scope"]) == ("SCOPE_MISSING", "generate")


def test_the_rate_is_limited(deployment: Deployment) -> None:
    refusals = []
    for _ in range(4):
        try:
            deployment.generate(token="slow", steps=1)
        except grpc.RpcError as error:
            refusals.append(error)
    assert refusals
    assert refusals[-1].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(refusals[-1])
    assert found["ErrorInfo"].reason == "RATE_LIMITED"
    assert 0 < found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 20
    assert deployment.generate(token="other", steps=1).images  # one token's rate is not another's


def test_concurrency_is_limited(deployment: Deployment) -> None:
    events = deployment.stream(token="narrow", num_candidates=2, steps=150)
    assert next(events).HasField("accepted")
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generate(token="narrow", steps=1)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "CONCURRENCY_LIMITED"
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    events.cancel()

    def admitted() -> bool:
        try:
            return bool(deployment.generate(token="narrow", steps=1).images)
        except grpc.RpcError:
            return False

    eventually(admitted, "the cancelled request's place is free again")


def _bomb() -> bytes:
    """A PNG of few bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (b"", "nothing"),
        (b"no image", "PNG, JPEG or WebP"),
        (PICTURE[: len(PICTURE) // 2], "truncated"),
        (_bomb(), "pixels"),
        (_animated(), "animated"),
        (bytes(1_000_001), "bytes"),
    ],
    ids=["empty", "text", "truncated", "bomb", "animated", "large"],
)
def test_a_bad_image_is_named(deployment: Deployment, image: bytes, word: str) -> None:
    pairs = [
        reward_pb2.ImagePrompt(image=PICTURE, prompt=PROMPT),
        reward_pb2.ImagePrompt(image=image, prompt=PROMPT),
    ]
    with pytest.raises(grpc.RpcError) as caught:
        _score(deployment, pairs)
    assert caught.value.code() == INVALID
    violation = details(caught.value)["BadRequest"].field_violations[0]
    assert violation.field == "pairs[1].image"
    assert word in violation.description


def test_no_pairs_and_too_many(deployment: Deployment) -> None:
    for pairs in ([], [reward_pb2.ImagePrompt(image=PICTURE, prompt=PROMPT)] * 257):
        with pytest.raises(grpc.RpcError) as caught:
            _score(deployment, pairs)
        assert details(caught.value)["BadRequest"].field_violations[0].field == "pairs"


def _score(deployment: Deployment, pairs: list[reward_pb2.ImagePrompt]) -> reward_pb2.ScoreImagesResponse:
    request = reward_pb2.ScoreImagesRequest(pairs=pairs)
    return deployment.reward.ScoreImages(request, metadata=deployment.metadata(), timeout=60)
