"""A canary's share of requests: the draw by itself, and a canary live beside the default."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from accord.artifacts import read_manifest
from accord.errors import ConfigError
from accord.v1 import generation_pb2 as pb
from services.config import CanarySettings, GatewayUserConfig
from services.gateway.canary import Role, draw, role
from services.local import environment
from tests.services.deployment import TIMEOUT_S, Deployment, details, eventually, make_spec

IDS = [f"request-{number}" for number in range(2000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_drawn_share_is_within_its_interval(share: float) -> None:
    drawn = sum(role("", one, CanarySettings(model="c", share=share)) is Role.CANARY for one in IDS)
    spread = (len(IDS) * share * (1 - share)) ** 0.5
    assert abs(drawn - len(IDS) * share) <= 3.3 * spread


def test_a_retry_is_drawn_alike_and_a_larger_share_keeps_what_it_had() -> None:
    few, many = (CanarySettings(model="c", share=share) for share in (0.2, 0.4))
    for one in IDS:
        assert draw(one) == draw(one)
        assert 0.0 <= draw(one) < 1.0
        if role("", one, few) is Role.CANARY:
            assert role("", one, many) is Role.CANARY


def test_the_ends_of_the_share_and_named_models() -> None:
    none, all_of_them = (CanarySettings(model="c", share=share) for share in (0.0, 1.0))
    assert {role("", one, none) for one in IDS} == {Role.CHAMPION}
    assert {role("", one, all_of_them) for one in IDS} == {Role.CANARY}
    assert {role("", one, None) for one in IDS} == {Role.CHAMPION}
    assert {role("base", one, all_of_them) for one in IDS} == {Role.NAMED}


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'c' is none of generation\.user_config\.models: base"):
        environment(None, ["gateway.user_config.canary={model: c, share: 0.1}"])
    with pytest.raises(ValueError, match="less than or equal to 1"):
        GatewayUserConfig.model_validate({"canary": {"model": "c", "share": 1.1}})


def with_canary(directory: Path, share: float) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["generation"]["user_config"]["models"]["canary"] = str(directory)
        config["gateway"]["user_config"]["canary"] = {"model": "canary", "share": share}

    return change


def ask(deployment: Deployment, request_id: str, **spec: Any) -> pb.GenerateImagesResponse:
    request = pb.GenerateImagesRequest(request_id=request_id, spec=make_spec(seed=1, steps=2, **spec))
    return deployment.generation.GenerateImages(request, metadata=deployment.metadata(), timeout=TIMEOUT_S)


def used(response: pb.GenerateImagesResponse) -> str:
    """The digest of the one model that all of a response is of."""
    digests = {image.manifest.model_digest for image in response.images} | {response.summary.model_digest}
    assert len(digests) == 1
    return str(digests.pop())


def counted(deployment: Deployment, outcome: str, role_: str, digest: str) -> float:
    """Requests of a role and model on the page of metrics."""
    with urllib.request.urlopen(deployment.metrics, timeout=30) as page:
        lines = page.read().decode().splitlines()
    wanted = (f'role="{role_}"', f'model="{digest[:12]}"', f'outcome="{outcome}"')
    found = [line for line in lines if line.startswith("ray_accord_model_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found if all(label in line for label in wanted))


@pytest.mark.cluster
def test_a_canary_answers_its_share_live(deployment: Deployment, rolled_directory: Path) -> None:
    champion, canary = deployment.generate().summary.model_digest, read_manifest(rolled_directory).digest
    ids = IDS[:12]
    drawn = next(one for one in ids if draw(one) < 0.5)
    replica = deployment.ask("process", "gateway")
    with deployment.deployed(with_canary(rolled_directory, 0.5)):
        eventually(lambda: used(ask(deployment, drawn)) == canary, "the canary answers")
        for one in ids:
            assert used(ask(deployment, one, num_images=2)) == (canary if draw(one) < 0.5 else champion)
        assert used(ask(deployment, drawn, model="base")) == champion
        eventually(lambda: counted(deployment, "ok", "canary", canary), "canary requests on the page")
        assert counted(deployment, "ok", "named", champion)
        # The share goes up live: the same ids, another division.
        with deployment.deployed(with_canary(rolled_directory, 1.0)):
            undrawn = next(one for one in ids if draw(one) >= 0.5)
            eventually(lambda: used(ask(deployment, undrawn)) == canary, "the new share holds")
    eventually(lambda: used(ask(deployment, drawn)) == champion, "the canary is gone")
    assert deployment.ask("process", "gateway") == replica


@pytest.mark.cluster
def test_no_client_sees_what_a_canary_fails_at(deployment: Deployment, broken_directory: Path) -> None:
    champion, canary = deployment.generate().summary.model_digest, read_manifest(broken_directory).digest
    with deployment.deployed(with_canary(broken_directory, 1.0)):

        def failed() -> float:
            assert used(ask(deployment, "a-request")) == champion
            return counted(deployment, "error", "canary", canary)

        eventually(failed, "the canary's errors are counted")
        # A stream says `accepted` again when the default takes over, and completes with one model.
        events = list(deployment.stream(steps=2))
        assert [e.accepted.model_digest for e in events if e.HasField("accepted")] == [canary, champion]
        assert events[-1].completed.summary.model_digest == champion
        with pytest.raises(grpc.RpcError) as named:
            ask(deployment, "a-request", model="canary")
        assert details(named.value)["ErrorInfo"].reason == "INTERNAL_ERROR"
        # What the default refuses too is the request's fault.
        with pytest.raises(grpc.RpcError) as refused:
            ask(deployment, "a-request", width=30)
        assert details(refused.value)["ErrorInfo"].reason == "FIELD_INVALID"
