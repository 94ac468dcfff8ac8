"""Hostile input: random bytes, random messages and mutated images never crash, hang or end as INTERNAL."""

from __future__ import annotations

import os
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accord.images import encode_png
from accord.v1 import generation_pb2 as pb
from accord.v1 import reward_pb2
from tests.services.deployment import PROMPT, Deployment, reason

pytestmark = pytest.mark.cluster

METHODS = [
    "accord.v1.GenerationService/GenerateImages",
    "accord.v1.GenerationService/ReplayImage",
    "accord.v1.GenerationService/ListModels",
    "accord.v1.RewardService/ScoreImages",
    "grpc.health.v1.Health/Check",
]
EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
EXAMPLES = 200 if os.environ.get("ACCORD_SOAK") else 15
few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PICTURE = encode_png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

texts = st.text(max_size=30)
numbers = st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))
floats = st.floats(width=32)
specs = st.builds(
    pb.GenerationSpec,
    prompt=st.one_of(st.just(PROMPT), texts),
    negative_prompt=texts,
    num_images=numbers,
    num_candidates=st.one_of(st.integers(0, 8), numbers),
    seed=st.integers(0, 2**64 - 1),
    steps=st.one_of(st.integers(0, 4), numbers),
    guidance_scale=st.one_of(st.floats(0, 8, width=32), floats),
    width=st.one_of(st.sampled_from([0, 32, 64]), numbers),
    height=st.one_of(st.sampled_from([0, 32, 64]), numbers),
    scheduler=st.integers(0, 5),
    image_format=st.integers(0, 4),
    model=st.one_of(st.just(""), texts),
    reward_model=st.one_of(st.just(""), texts),
    accept_reward=st.one_of(st.just(0.5), floats),
)
manifests = st.builds(
    pb.ImageManifest,
    model_digest=texts,
    prompt=texts,
    seed=st.integers(0, 2**64 - 1),
    candidate=numbers,
    steps=numbers,
    guidance_scale=floats,
    width=numbers,
    height=numbers,
    scheduler=st.integers(0, 5),
)


def _send(deployment: Deployment, method: str, data: bytes) -> grpc.StatusCode:
    failure: grpc.RpcError
    call = deployment.channel.unary_unary(f"/{method}")
    try:
        call(data, metadata=deployment.metadata(), timeout=90)
    except grpc.RpcError as error:
        failure = error
    else:
        return grpc.StatusCode.OK
    assert failure.code() in EXPECTED, (method, data, failure)
    reason(failure)
    return failure.code()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.binary(max_size=200))
@few
def test_random_bytes(deployment: Deployment, method: str, data: bytes) -> None:
    _send(deployment, method, data)


@given(spec=specs, request_id=st.one_of(st.just(""), texts))
@few
def test_random_specs(deployment: Deployment, spec: pb.GenerationSpec, request_id: str) -> None:
    request = pb.GenerateImagesRequest(spec=spec, request_id=request_id)
    _send(deployment, METHODS[0], request.SerializeToString())


@given(manifest=manifests, known=st.booleans())
@few
def test_random_manifests(deployment: Deployment, manifest: pb.ImageManifest, known: bool) -> None:
    if known:
        manifest.model_digest = _digest(deployment)
    request = pb.ReplayImageRequest(manifest=manifest)
    _send(deployment, METHODS[1], request.SerializeToString())


@given(
    start=st.integers(0, len(PICTURE)),
    middle=st.binary(max_size=20),
    skipped=st.integers(0, 20),
    prompt=st.one_of(st.just(PROMPT), texts),
)
@few
def test_mutated_images(deployment: Deployment, start: int, middle: bytes, skipped: int, prompt: str) -> None:
    mutated = PICTURE[:start] + middle + PICTURE[start + skipped :]
    request = reward_pb2.ScoreImagesRequest(pairs=[reward_pb2.ImagePrompt(image=mutated, prompt=prompt)])
    _send(deployment, METHODS[3], request.SerializeToString())


_digests: dict[str, str] = {}


def _digest(deployment: Deployment) -> str:
    if deployment.address not in _digests:
        models: Any = deployment.generation.ListModels(
            pb.ListModelsRequest(), metadata=deployment.metadata()
        ).models
        _digests[deployment.address] = models[0].digest
    return _digests[deployment.address]
