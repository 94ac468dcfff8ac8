"""Promote, canary and rollback on a real local deployment, by Serve's own REST API, under load.

`accord serve --manage` is deployed by a config, as on a cluster. What moves it is the command line, and
services.rollout with a real Prometheus and a real feedback service.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from accord.artifacts import read_manifest
from accord.client import FeedbackClient, NotFound
from accord.diffusion.model import load_diffusion_model, save_diffusion_model
from accord.registry.gate import DIFFUSION, measurements
from accord.registry.registry import CANARY, CHAMPION, Registry
from accord.registry.rollout import RolloutPolicy
from accord.registry.runs import RunModel
from accord.registry.settings import GateConfig
from accord.tokens import read_secret
from k8s.monitoring.dashboards import MODELS, SERVING
from services.rollout.config import GrpcEndpoint, RolloutConfig, ServeEndpoint
from services.rollout.main import LiveSources
from services.rollout.moves import MoveError, Mover
from services.rollout.serving import ServeApi
from services.rollout.sources import Gateway
from services.rollout.watch import BY, Rollout
from tests.registry.run import GOOD
from tests.services.conftest import serve_config
from tests.services.deployment import Deployment, eventually
from tests.services.feedback.conftest import Running, make_config, make_store, make_tokens, run_service
from tests.services.rollout.prometheus import answered, prometheus
from tests.services.test_canary import counted, used
from tests.services.test_operations import load

pytestmark = [pytest.mark.cluster, pytest.mark.prometheus]

NAME = "accord-diffusion"
WHO = {"by": "olga", "why": "a test"}
# Queries that may be empty here: of what did not happen, is not there, or comes from other pages and rules.
QUIET = re.compile(
    "errors_total|cancelled|expired|retries|failures|failed|refused|gram_|gpus|accord:|rollout|up{|last_look"
)


@dataclass(frozen=True)
class Managed:
    """A deployment, the file that manages it, and a registry with three versions: two good ones, one that
    draws nothing finite."""

    deployment: Deployment
    file: Path
    registry_uri: str
    digests: dict[str, str]
    feedback: Running

    @property
    def registry(self) -> Registry:
        return Registry(self.registry_uri)

    @property
    def config(self) -> RolloutConfig:
        return RolloutConfig.model_validate(yaml.safe_load(self.file.read_text()))

    @property
    def serving(self) -> ServeApi:
        return ServeApi(self.config.serve)

    def mover(self, timeout_s: float = 180.0) -> Mover:
        return Mover(self.serving, Gateway(self.config.gateway), self.registry, timeout_s=timeout_s)

    def command(self, *arguments: str) -> str:
        """`accord models`, as an operator gives it."""
        done = subprocess.run(
            [sys.executable, "-m", "accord.cli", "models", *arguments, "--why", "a test",
             "--serve", str(self.file), "--registry", self.registry_uri],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def managed(
    tmp_path_factory: pytest.TempPathFactory,
    reward_directory: Path,
    rolled_directory: Path,
    broken_directory: Path,
    root: Path,
    empty_store: bytes,
) -> Iterator[Managed]:
    directory = tmp_path_factory.mktemp("managed")
    second = load_diffusion_model(rolled_directory)
    with torch.no_grad():
        second.unet.conv_out.weight.mul_(0.9)
    save_diffusion_model(second, directory / "second", inputs={}, config={}, seed=0)
    (directory / "models.db").write_bytes(empty_store)
    uri = f"sqlite:///{directory / 'models.db'}"
    registry, digests = Registry(uri), {}
    for name, place in (("1", rolled_directory), ("2", directory / "second"), ("3", broken_directory)):
        manifest = read_manifest(place)
        model = RunModel(DIFFUSION, place, manifest, measurements(DIFFUSION, GOOD))
        registry.register("accord", model, "tiny", GateConfig())
        digests[name] = manifest.digest
    url = make_store(directory)
    feedback = iter(run_service(make_config(directory, url), url, make_tokens(directory)))
    running = next(feedback)
    (directory / "boss").write_text(running.tokens["boss"])
    config = serve_config(reward_directory)
    config["gateway"]["user_config"]["record"] = {
        "url": running.service.addresses["gRPC"],
        "share": 1.0,
        "queue_images": 10_000,
        "token_file": str(directory / "boss"),
    }
    (directory / "serve.yaml").write_text(yaml.safe_dump(config))
    with _served(root, directory) as deployment:
        yield Managed(deployment, directory / "manage.yaml", uri, digests, running)
    next(feedback, None)


@contextmanager
def _served(root: Path, directory: Path) -> Iterator[Deployment]:
    command = [sys.executable, "-m", "accord.cli", "serve", "--port", "0"]
    for option, name in (
        ("--environment", "serve.yaml"),
        ("--manage", "manage.yaml"),
        ("--endpoint-file", "endpoint.json"),
    ):
        command += [option, str(directory / name)]
    environment = {**os.environ, "PYTHONPATH": str(root), "ACCORD_HOME": str(directory / "home")}
    with open(directory / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
        )
    try:
        ready = directory / "endpoint.json"
        eventually(lambda: ready.exists() or process.poll() is not None, "it is ready", 300)
        assert ready.exists(), (directory / "log").read_text()[-4000:]
        endpoint = json.loads(ready.read_text())
        about = {"address": endpoint["address"], "metrics": endpoint["metrics_address"]}
        running = Deployment(process, {}, {"all": read_secret(endpoint["secret_path"])}, about)
        yield running
        running.channel.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def test_one_command_moves_the_alias_and_the_traffic_and_one_moves_both_back(
    managed: Managed, record_property: pytest.RecordProperty
) -> None:
    deployment, first, second = managed.deployment, managed.digests["1"], managed.digests["2"]
    base = deployment.generate().summary.model_digest

    def answered_by(digest: str) -> bool:
        return bool(running.errors) or used(running.answers[-1]) == digest

    with load(deployment, num_images=2, steps=2) as running:
        running.enough(4)
        told = managed.command("promote", f"{NAME}/1")
        assert f"{NAME}/1 serves as champion ({NAME}-1): loaded in" in told
        eventually(lambda: answered_by(first), "version 1 answers")
        managed.mover().promote(f"{NAME}/2", share=0.5, **WHO)
        since = len(running.answers)
        running.enough(40, since)
        drawn = [used(answer) == second for answer in running.answers[since:]]
        managed.mover().promote(f"{NAME}/2", **WHO)  # the canary becomes champion
        eventually(lambda: answered_by(second), "version 2 answers")
        begun = time.monotonic()
        told = managed.command("rollback", NAME)
        seconds = time.monotonic() - begun
        assert f"{NAME}/1 serves again ({NAME}-1): switched in" in told
        eventually(lambda: answered_by(first), "version 1 answers again")
        running.enough(4, len(running.answers))
    record_property("rollback_s", round(seconds, 1))
    print(f"rollback in {seconds:.1f} s: {told.strip()}; canary {sum(drawn)} of {len(drawn)}")
    assert not running.errors, running.errors[0]
    assert {used(answer) for answer in running.answers} == {base, first, second}  # and none is of two
    assert abs(sum(drawn) - len(drawn) / 2) <= 3.9 * (len(drawn) / 4) ** 0.5 + 4  # four were under way
    moves = [(event.action, event.alias, event.version) for event in managed.registry.history(NAME)]
    assert moves == [
        ("promote", CHAMPION, 1),
        ("promote", CANARY, 2),
        ("promote", CHAMPION, 2),
        ("graduate", CANARY, None),
        ("rollback", CHAMPION, 1),
    ]


def test_what_cannot_be_loaded_leaves_all_as_it_was(managed: Managed, tmp_path: Path) -> None:
    before = managed.serving.read()
    manifest = read_manifest(managed.registry.get(f"{NAME}/1").directory)
    lost = RunModel(
        DIFFUSION,
        tmp_path / "lost",
        manifest.model_copy(update={"digest": "d" * 64}),
        measurements(DIFFUSION, GOOD),
    )
    version, _ = managed.registry.register("accord", lost, "tiny", GateConfig())
    history = managed.registry.history(NAME)
    with pytest.raises(MoveError, match=r"was not loaded within 2 s, and what serves is as it was"):
        managed.mover(timeout_s=2.0).promote(str(version), **WHO)
    assert managed.serving.read() == before
    assert managed.registry.history(NAME) == history
    with pytest.raises(MoveError, match=f"'nothing' is none of the models that are served: .*{NAME}-1"):
        managed.mover().rollback(NAME, to="nothing", **WHO)


@contextmanager
def _watched(managed: Managed, url: str, directory: Path) -> Iterator[Rollout]:
    """services.rollout at work, on what `managed` serves."""
    (directory / "boss").write_text(managed.feedback.tokens["boss"])
    address = managed.feedback.service.addresses["gRPC"]
    config = RolloutConfig(
        prometheus=url,
        gateway=managed.config.gateway,
        feedback=GrpcEndpoint(url=address, token_file=str(directory / "boss")),
        serve=ServeEndpoint(url=managed.config.serve.url, token_file=managed.config.serve.token_file),
        policy=RolloutPolicy(min_errors=3),
    )
    stop = threading.Event()
    rollout = Rollout(config.policy, LiveSources(config), managed.serving, managed.registry, NAME)
    watching = threading.Thread(target=rollout.run, args=(0.5, stop))
    watching.start()
    try:
        yield rollout
    finally:
        stop.set()
        watching.join(60)


def test_a_bad_canary_is_taken_out_for_its_errors_and_for_what_people_say(
    managed: Managed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = managed.deployment
    champion = deployment.generate().summary.model_digest
    with prometheus(tmp_path, deployment.metrics, every_s=2) as url, _watched(managed, url, tmp_path):
        managed.mover().promote(f"{NAME}/3", share=0.5, **WHO)
        with load(deployment, num_images=2, steps=2) as running:
            eventually(
                lambda: running.errors or managed.serving.read().canary is None, "errors take it out", 240
            )
            running.enough(4, len(running.answers))
        assert not running.errors, running.errors[0]
        assert {used(answer) for answer in running.answers} == {champion}
        assert counted(deployment, "error", "canary", managed.digests["3"]) >= 3
        _until_recorded(managed, "errors")

        managed.mover().promote(f"{NAME}/2", share=0.5, **WHO)
        rated: dict[str, int] = {champion: 0, managed.digests["2"]: 0}
        with load(deployment, num_images=2, steps=2) as running:
            eventually(
                lambda: {used(a) for a in running.answers} >= set(rated) or running.errors, "both answer", 240
            )
            running.enough(30, len(running.answers))
        assert not running.errors, running.errors[0]
        address = managed.feedback.service.addresses["gRPC"]
        with FeedbackClient(address, token=managed.feedback.tokens["robot"]) as client:
            for answer in running.answers:
                digest = used(answer)
                if digest in rated and rated[digest] < 12:
                    for image in answer.images:
                        rated[digest] += _rate(client, image.image_id, digest == champion)
        assert min(rated.values()) >= 8, rated
        eventually(lambda: managed.serving.read().canary is None, "people take it out", 240)
        _until_recorded(managed, "good 0 of")
        silent = [query for query in (*SERVING.queries, *MODELS.queries) if not answered(url, query)]
    assert [query for query in silent if not QUIET.search(query)] == []
    assert caplog.text.count("took out the canary") == 2
    assert deployment.generate().summary.model_digest == champion


def _until_recorded(managed: Managed, reason: str) -> None:
    def recorded() -> bool:
        last = managed.registry.history(NAME)[-1]
        return (last.action, last.alias, last.by) == ("rollback", CANARY, BY) and reason in last.why

    eventually(recorded, f"the registry has {reason!r}")


def _rate(client: FeedbackClient, image_id: str, good: bool) -> bool:
    """A verdict on a served image, once it has been recorded."""

    def counted_now() -> bool:
        try:
            return client.rate(image_id, "good" if good else "bad", rater="live")
        except NotFound:
            return False

    eventually(counted_now, f"{image_id} is recorded")
    return True
