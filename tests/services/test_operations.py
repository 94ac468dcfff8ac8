"""What operators do, and what befalls them, while it serves: limits, a new model, dead replicas, load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from accord.artifacts import read_manifest
from accord.v1 import generation_pb2 as pb
from tests.services.deployment import Deployment, details, eventually, same_pixels

pytestmark = pytest.mark.cluster

SOAK = bool(os.environ.get("ACCORD_SOAK"))
REQUESTS = 200 if SOAK else 20
CLIENTS = 4


class Load:
    """Clients that ask all the time; `answers` and `errors` of all of them."""

    def __init__(self, deployment: Deployment, **spec: Any) -> None:
        self._deployment, self._spec = deployment, spec
        self._stop = threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        self.answers: list[pb.GenerateImagesResponse] = []
        self.errors: list[grpc.RpcError] = []
        self.threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self._count += 1
                seed = self._count
            try:
                self.answers.append(self._deployment.generate(seed=seed, **self._spec))
            except grpc.RpcError as error:
                self.errors.append(error)

    def enough(self, more: int, since: int = 0) -> None:
        """Waits until `more` answers came after the first `since`."""
        eventually(
            lambda: self.errors or len(self.answers) >= since + more, f"{more} more answers", timeout_s=240
        )

    def stop(self) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join(180)


@contextmanager
def load(deployment: Deployment, **spec: Any) -> Iterator[Load]:
    running = Load(deployment, **spec)
    for thread in running.threads:
        thread.start()
    try:
        yield running
    finally:
        running.stop()


def test_limits_change_live(deployment: Deployment) -> None:
    def narrower(config: dict[str, Any]) -> None:
        config["gateway"]["user_config"]["limits"]["max_images"] = 2

    replica = deployment.ask("process", "gateway")
    with deployment.deployed(narrower):

        def refused() -> bool:
            try:
                deployment.generate(num_images=3)
            except grpc.RpcError as error:
                return bool(details(error)["BadRequest"].field_violations[0].field == "spec.num_images")
            return False

        eventually(refused, "the new limit holds")
        assert deployment.generate(num_images=2).images
        assert deployment.ask("process", "gateway") == replica
    eventually(lambda: _answers(deployment, num_images=3), "the old limit holds again")


def test_a_new_model_rolls_in_under_load(deployment: Deployment, rolled_directory: Path) -> None:
    old = deployment.generate().summary.model_digest
    new = read_manifest(rolled_directory).digest

    def rolled(config: dict[str, Any]) -> None:
        config["generation"]["user_config"]["models"]["base"] = str(rolled_directory)

    replica = deployment.ask("engine")["process_id"]
    # More candidates than are drawn at a time: a request goes on after the old model is dropped.
    with load(deployment, num_images=20, steps=2) as running:
        running.enough(4)
        with deployment.deployed(rolled):
            eventually(lambda: running.errors or _digest(running) == new, "the new model answers")
            running.enough(4, len(running.answers))
        eventually(lambda: running.errors or _digest(running) == old, "the old model answers again")
    assert not running.errors, running.errors[0]
    for answer in running.answers:
        used = {image.manifest.model_digest for image in answer.images} | {answer.summary.model_digest}
        assert len(used) == 1
        assert used <= {old, new}
    assert deployment.ask("engine")["process_id"] == replica


def test_a_model_that_cannot_be_loaded_changes_nothing(deployment: Deployment, tmp_path: Path) -> None:
    def broken(config: dict[str, Any]) -> None:
        config["generation"]["user_config"] = {"models": {"new": str(tmp_path)}, "default": "new"}

    before = deployment.generate(seed=4)
    with deployment.deployed(broken):
        deployment.ask("settled")
        assert same_pixels(deployment.generate(seed=4).images[0], before.images[0])


@pytest.mark.parametrize("victim", ["generation", "reward"])
def test_no_client_sees_a_replica_die(deployment: Deployment, victim: str) -> None:
    def process_id() -> int:
        if victim == "generation":
            return int(deployment.ask("engine")["process_id"])
        return int(deployment.ask("process", "reward"))

    first = process_id()
    reference = {seed: deployment.generate(seed=seed, steps=10).images[0] for seed in (1, 2)}
    with load(deployment, steps=10) as running:
        running.enough(CLIENTS)
        os.kill(first, signal.SIGKILL)
        running.enough(REQUESTS, len(running.answers))
    assert not running.errors, running.errors[0]
    assert process_id() != first
    for seed, image in reference.items():
        assert same_pixels(deployment.generate(seed=seed, steps=10).images[0], image)


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="takes minutes: ACCORD_SOAK=1")
def test_one_best_of_sixteen_scales_out_and_back_in(deployment: Deployment) -> None:
    def scaling(config: dict[str, Any]) -> None:
        config["generation"]["num_cpus"] = 0.25
        config["generation"]["autoscaling"] = {
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 4,
            "upscale_delay_s": 1.0,
            "downscale_delay_s": 5.0,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 3.0,
        }

    def running() -> int:
        return int(deployment.ask("replicas")["Generation"].get("RUNNING", 0))

    with deployment.deployed(scaling):
        eventually(lambda: running() == 1, "one replica")
        events = deployment.stream(num_candidates=16, steps=150, guidance_scale=3.0)
        thread = threading.Thread(target=lambda: list(_until_error(events)))
        thread.start()
        eventually(lambda: running() == 2, "two replicas", timeout_s=180)
        events.cancel()
        thread.join()
        eventually(lambda: running() == 1, "one replica again", timeout_s=180)


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="takes minutes: ACCORD_SOAK=1")
def test_overload_is_refused_early_and_shared_fairly(deployment: Deployment) -> None:
    refusals: list[float] = []
    errors: list[grpc.RpcError] = []
    served = {"all": 0, "other": 0}
    # Whoever comes first may have everything, and keeps it until it is drawn: shares are counted later.
    fair = time.monotonic() + 20
    stop = fair + 40

    def client(token: str) -> None:
        while time.monotonic() < stop:
            begun = time.monotonic()
            try:
                deployment.generate(token=token, steps=10, num_candidates=8)
                served[token] += begun > fair
            except grpc.RpcError as error:
                refusals.append(time.monotonic() - begun)
                errors.append(error)
                time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(token,)) for token in ["all"] * 30 + ["other"] * 15]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all("RetryInfo" in details(error) for error in errors)
    shares = list(served.values())
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    median = sorted(refusals)[len(refusals) // 2]
    print(f"served {served}, Jain {jain:.3f}, refused {len(refusals)}, median {median:.3f} s")
    assert jain >= 0.95


def _digest(running: Load) -> str:
    return running.answers[-1].summary.model_digest


def _answers(deployment: Deployment, **spec: Any) -> bool:
    try:
        return bool(deployment.generate(**spec).images)
    except grpc.RpcError:
        return False


def _until_error(events: Any) -> Iterator[Any]:
    try:
        yield from events
    except grpc.RpcError:
        return
