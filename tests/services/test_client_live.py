"""Our client, sync and async, against a real deployment: results, errors, killed gateways, TLS."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from accord import client as api
from accord.client import TLS, Client, RetryPolicy
from tests.client import nginx
from tests.client.both import Blocking
from tests.client.certificates import Authority
from tests.services.deployment import PROMPT, Deployment, eventually

pytestmark = pytest.mark.cluster

Connect = Callable[..., Client]
REQUESTS = 200 if os.environ.get("ACCORD_SOAK") else 20
NO_RETRY = RetryPolicy(max_attempts=1)


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, deployment: Deployment) -> Iterator[Connect]:
    """Makes clients of each kind in turn, that behave as the blocking one does."""
    made: list[Any] = []

    def make(token: str = "all", target: str | None = None, **settings: Any) -> Any:
        kind: Any = Client if request.param == "sync" else Blocking
        settings = {"token": deployment.tokens.get(token, token), **settings}
        made.append(kind(target or deployment.address, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_the_best_of_eight_with_progress(connect: Connect) -> None:
    told: list[api.Progress] = []
    client = connect()
    made = client.generate(PROMPT, num_images=2, candidates=8, seed=7, steps=4, on_progress=told.append)
    assert [image.rank for image in made.images] == [1, 2]
    assert made.images[0].reward >= made.images[1].reward
    assert (made.summary.candidates_done, made.summary.seed) == (8, 7)
    assert told[-1].candidates_total == 8
    assert 0 < told[-1].fraction <= 1
    unary = client.generate(PROMPT, num_images=2, candidates=8, seed=7, steps=4)
    assert [image.candidate for image in unary.images] == [image.candidate for image in made.images]


def test_scores_replays_and_lists(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    image = client.generate(PROMPT, candidates=2, steps=4).best
    path = image.save(tmp_path / "image.png")
    (score,) = client.score([(path, PROMPT)])
    assert score.reward == pytest.approx(image.reward, abs=1e-3)
    again = client.replay(api.manifest_from_png(path.read_bytes()))
    difference = np.abs(again.pixels().astype(int) - image.pixels().astype(int))
    assert difference.max() <= 1
    assert image.manifest.model_digest in {model.digest for model in client.models()}


def test_a_stream_tells_all(connect: Connect) -> None:
    events = list(connect().stream(PROMPT, candidates=3, steps=4))
    assert isinstance(events[0], api.Accepted)
    images = [event for event in events if isinstance(event, api.GeneratedImage)]
    assert sorted(image.candidate for image in images) == [0, 1, 2]
    assert isinstance(events[-1], api.Generation)
    assert events[-1].best.reward == max(image.reward for image in images)


def test_errors_have_their_types(connect: Connect) -> None:
    client = connect()
    with pytest.raises(api.InvalidRequest) as wrong:
        client.generate(PROMPT, steps=999, width=7)
    assert {violation.field for violation in wrong.value.violations} >= {"spec.steps"}
    assert wrong.value.reason == "FIELD_INVALID"
    with pytest.raises(api.ModelNotFound, match="nonsense"):
        client.generate(PROMPT, model="nonsense")
    with pytest.raises(api.InvalidRequest) as damaged:
        client.score([(b"GIF89a", PROMPT)])
    assert damaged.value.reason == "IMAGE_INVALID"
    with pytest.raises(api.DeadlineExceeded):
        client.generate(PROMPT, candidates=64, steps=150, timeout_s=0.5)
    with pytest.raises(api.Unauthenticated, match="does not know this token"):
        connect("accord_wrong").models()
    with pytest.raises(api.PermissionDenied, match="generate"):
        connect("scores").generate(PROMPT)


def test_a_token_s_limit_is_an_overload_that_retries_outlast(connect: Connect) -> None:
    events = connect("narrow").stream(PROMPT, candidates=2, steps=150)
    assert isinstance(next(events), api.Accepted)
    with pytest.raises(api.Overloaded) as refused:
        connect("narrow", retry=NO_RETRY).generate(PROMPT, steps=1)
    assert refused.value.reason == "CONCURRENCY_LIMITED"
    assert refused.value.retry_after_s is not None
    patient = RetryPolicy(max_attempts=1000)
    events.close()
    assert connect("narrow", retry=patient).generate(PROMPT, steps=1, timeout_s=120).images


@pytest.mark.timeout(600)
def test_no_user_of_the_client_sees_a_gateway_die(deployment: Deployment) -> None:
    def two_gateways(config: dict[str, Any]) -> None:
        config["gateway"]["autoscaling"] = {"min_replicas": 2, "max_replicas": 2}

    def running() -> bool:
        states = deployment.ask("replicas")["Gateway"]
        return bool(states == {"RUNNING": 2})

    with (
        deployment.deployed(two_gateways),
        Client(deployment.address, token=deployment.tokens["all"]) as client,
    ):
        eventually(running, "two gateways")
        reference = client.generate(PROMPT, seed=1, steps=10).best.pixels().astype(int)
        answers: list[api.Generation] = []
        errors: list[Exception] = []
        kill = threading.Event()

        def ask(stream: bool) -> None:
            for _ in range(REQUESTS // 4):
                try:
                    progress = (lambda told: None) if stream else None
                    answers.append(client.generate(PROMPT, seed=1, steps=10, on_progress=progress))
                except Exception as error:
                    errors.append(error)
                if len(answers) >= REQUESTS // 4:
                    kill.set()

        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        assert kill.wait(240)
        os.kill(int(deployment.ask("process", "gateway")), signal.SIGKILL)
        for thread in threads:
            thread.join(240)
        assert not errors, errors[0]
        assert len(answers) == REQUESTS // 4 * 4
        assert all(np.abs(answer.best.pixels() - reference).max() <= 1 for answer in answers)
        eventually(running, "two gateways again")


@pytest.mark.nginx
def test_through_tls_of_a_real_proxy(connect: Connect, deployment: Deployment, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    upstream = int(deployment.address.rpartition(":")[2])
    with nginx.terminating_tls(tmp_path / "nginx", authority.sign("localhost"), upstream) as port:
        target = f"grpcs://localhost:{port}"
        client = connect(target=target, tls=TLS(ca_file=authority.file))
        made = client.generate(PROMPT, num_images=2, candidates=4, steps=4, on_progress=lambda told: None)
        assert len(made.images) == 2
        assert client.score([(made.best.data, PROMPT)])
        with pytest.raises(api.InvalidRequest) as wrong:
            client.generate(PROMPT, steps=999)
        assert wrong.value.violations[0].field == "spec.steps"
        with pytest.raises(api.UntrustedCertificate, match="not trusted"):
            connect(target=target).models()
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel:  # as a probe would
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
