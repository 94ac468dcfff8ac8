"""What the rollout reads from a real Prometheus and a real feedback service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from accord.images import encode_png
from accord.registry.rollout import Observed
from accord.v1 import feedback_pb2
from services.rollout.config import GrpcEndpoint
from services.rollout.sources import Feedback, Prometheus, SourceError
from tests.services.deployment import eventually
from tests.services.feedback.conftest import Running, make_config, make_store, make_tokens, run_service
from tests.services.rollout.prometheus import prometheus

OLD, NEW = "a" * 64, "b" * 64


class Page:
    """The gateway's metrics, as two of its processes export them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("role", "model", "outcome", "WorkerId")
        self.requests = Counter("ray_accord_model_requests", "r", labels, registry=self.registry)
        self.seconds = Histogram(
            "ray_accord_model_request_seconds", "s", ("role", "model", "WorkerId"), registry=self.registry
        )

    def count(self, role: str, digest: str, outcome: str, worker: str, times: int) -> None:
        self.requests.labels(role, digest[:12], outcome, worker).inc(times)


@pytest.fixture
def page() -> Iterator[tuple[Page, str]]:
    made = Page()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=made.registry)
    assert isinstance(thread, threading.Thread)
    yield made, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


@pytest.mark.prometheus
def test_requests_are_counted_from_the_first_one_by_role_and_model(
    page: tuple[Page, str], tmp_path: Path
) -> None:
    metrics, address = page
    metrics.count("champion", OLD, "ok", "1", 1000)
    metrics.count("named", NEW, "error", "1", 7)
    with prometheus(tmp_path, address) as url:
        source = Prometheus(url)
        assert source.requests("canary", NEW, 3600) == Observed()
        eventually(lambda: source.requests("champion", OLD, 3600).ok == 1000, "the page is scraped")
        # The canary's series begin with its errors: nothing rises that `increase` could see.
        metrics.count("canary", NEW, "error", "1", 3)
        metrics.count("canary", NEW, "error", "2", 1)
        metrics.count("canary", NEW, "ok", "2", 5)
        for _ in range(20):
            metrics.seconds.labels("canary", NEW[:12], "2").observe(0.3)
        eventually(lambda: source.requests("canary", NEW, 3600).requests == 9, "all of the canary's")
        found = source.requests("canary", NEW, 3600)
        assert (found.ok, found.errors) == (5, 4)
        metrics.seconds.labels("canary", NEW[:12], "2").observe(0.3)
        eventually(lambda: source.requests("canary", NEW, 3600).latency_s is not None, "a latency is known")
        # What happened before the window does not count.
        eventually(lambda: source.requests("champion", OLD, 10).ok == 0, "the champion's are older than 10 s")
        metrics.count("champion", OLD, "ok", "1", 2)
        eventually(lambda: source.requests("champion", OLD, 10).ok == 2, "the two new ones")
        assert source.requests("champion", OLD, 3600).ok == 1002


def test_a_prometheus_that_is_away_is_told() -> None:
    with pytest.raises(SourceError, match=r"Prometheus at http://127\.0\.0\.1:1 does not answer"):
        Prometheus("http://127.0.0.1:1/").requests("canary", NEW, 3600)


def test_verdicts_of_people_come_from_the_feedback_service(tmp_path: Path) -> None:
    url = make_store(tmp_path)
    running = iter(run_service(make_config(tmp_path, url), url, make_tokens(tmp_path)))
    service: Running = next(running)
    try:
        stub, boss = service.stub(), service.bearer("boss")
        png = encode_png(np.zeros((8, 8, 3), dtype=np.uint8))
        for rater, verdict in (("a", 1), ("b", 2), ("c", 1), ("d", 3)):
            record = feedback_pb2.RecordServedImageRequest(
                image_id=f"image-{rater}", image=png, prompt="a star", model_digest=NEW
            )
            stub.RecordServedImage(record, metadata=boss, timeout=60)
            rating = feedback_pb2.RateServedImageRequest(
                image_id=record.image_id,
                rater=rater,
                idempotency_key=f"key-{rater}-12345",
                verdict=feedback_pb2.Verdict.ValueType(verdict),
            )
            stub.RateServedImage(rating, metadata=boss, timeout=60)
        address = service.service.addresses["gRPC"]
        for name in ("boss", "robot"):
            (tmp_path / name).write_text(service.tokens[name])
        seen = {OLD: Observed(ok=1), NEW: Observed(ok=2)}
        source = Feedback(GrpcEndpoint(url=address, token_file=str(tmp_path / "boss")))
        found = source.add_verdicts(seen, 3600)
        assert found == {OLD: Observed(ok=1), NEW: Observed(ok=2, good=2, bad=1)}
        source.close()
        refused = Feedback(GrpcEndpoint(url=address, token_file=str(tmp_path / "robot")))
        with pytest.raises(SourceError, match="PERMISSION_DENIED"):
            refused.add_verdicts(seen, 3600)
        refused.close()
    finally:
        next(running, None)
