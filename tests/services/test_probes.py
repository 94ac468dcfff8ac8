"""Health, reflection and metrics: what programs other than clients ask."""

from __future__ import annotations

import urllib.request

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.services.deployment import Deployment, details, eventually, reason

pytestmark = pytest.mark.cluster

SERVING = health_pb2.HealthCheckResponse.SERVING


def test_health_answers_without_a_token(deployment: Deployment) -> None:
    stub = health_pb2_grpc.HealthStub(deployment.channel)
    for service in ("", "accord.v1.GenerationService", "accord.v1.RewardService"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="accord.v1.Nonsense"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "SERVICE_NOT_FOUND"


def test_watches_are_capped(deployment: Deployment) -> None:
    stub = health_pb2_grpc.HealthStub(deployment.channel)
    open_ = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    assert [next(watch).status for watch in open_] == [SERVING] * 2
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stub.Watch(health_pb2.HealthCheckRequest()):
            pass
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "WATCHES_LIMITED"
    assert found["RetryInfo"].retry_delay.seconds > 0
    for watch in open_:
        watch.cancel()

    def again() -> bool:
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="unknown"))
        try:
            return bool(next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        except grpc.RpcError:
            return False
        finally:
            watch.cancel()

    eventually(again, "a cancelled watch makes room")


def test_a_client_can_be_made_of_reflection_alone(deployment: Deployment) -> None:
    database = ProtoReflectionDescriptorDatabase(deployment.channel)
    services = set(database.get_services())
    assert {"accord.v1.GenerationService", "accord.v1.RewardService", "grpc.health.v1.Health"} <= services
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName("accord.v1.GenerationService").FindMethodByName("GenerateImages")
    request_type = message_factory.GetMessageClass(method.input_type)
    response_type = message_factory.GetMessageClass(method.output_type)
    request = request_type()
    request.spec.prompt = "a red star"
    request.spec.num_images = 2
    call = deployment.channel.unary_unary(
        "/accord.v1.GenerationService/GenerateImages",
        request_serializer=request_type.SerializeToString,
        response_deserializer=response_type.FromString,
    )
    answer = call(request, metadata=deployment.metadata(), timeout=60)
    assert [image.rank for image in answer.images] == [1, 2]


def test_a_method_of_no_service(deployment: Deployment) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.channel.unary_unary("/accord.v1.GenerationService/process_id")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_metrics_are_exported(deployment: Deployment) -> None:
    deployment.generate(num_images=2, num_candidates=4)
    with pytest.raises(grpc.RpcError):
        deployment.generate(prompt="")
    wanted = [
        "ray_accord_requests_total",
        "ray_accord_errors_total",
        "ray_accord_request_seconds_bucket",
        "ray_accord_images_total",
        "ray_accord_candidates_total",
        "ray_accord_candidates_per_image_bucket",
        "ray_accord_reward_bucket",
        "ray_accord_model_requests_total",
        "ray_accord_model_request_seconds_bucket",
        "ray_accord_scored_images_total",
        "ray_accord_score_batch_images_bucket",
        "ray_accord_engine_batch_occupancy_ratio",
        "ray_accord_engine_step_seconds",
        "ray_accord_engine_queue_seconds",
        "ray_accord_engine_text_cache_hits_total",
    ]

    def missing() -> list[str]:
        with urllib.request.urlopen(deployment.metrics, timeout=10) as page:
            text = page.read().decode()
        found = [
            'method="GenerateImages"' in text and 'status="INVALID_ARGUMENT"' in text,
            'reason="FIELD_INVALID"' in text,
        ]
        return [name for name in wanted if f"{name}{{" not in text] + ["labels"] * (not all(found))

    try:
        eventually(lambda: not missing(), "all metrics are on the page", timeout_s=60)
    except AssertionError:
        pytest.fail(f"not on the page: {missing()}")
