"""A canary made bad on purpose is taken out by what a real Prometheus scrapes, and no client sees it."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest

from accord.artifacts import read_manifest
from accord.registry.rollout import RolloutPolicy
from services.rollout.config import GrpcEndpoint, RolloutConfig, ServeEndpoint
from services.rollout.main import LiveSources
from services.rollout.serving import UserConfigs
from services.rollout.watch import Rollout
from tests.services.deployment import Deployment, eventually
from tests.services.rollout.prometheus import prometheus
from tests.services.test_canary import counted, used, with_canary
from tests.services.test_operations import load


class Applied:
    """The deployment under test: its user_configs change as those of a config file do, live."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment, self.config = deployment, copy.deepcopy(deployment.config)

    def read(self) -> UserConfigs:
        return UserConfigs(self.config["generation"]["user_config"], self.config["gateway"]["user_config"])

    def write(self, configs: UserConfigs) -> None:
        changed = json.loads(json.dumps(self.config))
        changed["generation"]["user_config"] = configs.generation
        changed["gateway"]["user_config"] = configs.gateway
        self._deployment.ask("deploy", changed)
        self.config = changed


@pytest.mark.cluster
@pytest.mark.prometheus
def test_a_bad_canary_is_taken_out(
    deployment: Deployment, broken_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion, canary = deployment.generate().summary.model_digest, read_manifest(broken_directory).digest
    (tmp_path / "token").write_text(deployment.tokens["all"])
    serving, stop = Applied(deployment), threading.Event()
    change = with_canary(broken_directory, 0.5)
    change(serving.config)
    with prometheus(tmp_path, deployment.metrics, every_s=3) as url, deployment.deployed(change):
        config = RolloutConfig(
            prometheus=url,
            gateway=GrpcEndpoint(url=deployment.address, token_file=str(tmp_path / "token")),
            serve=ServeEndpoint(url="http://127.0.0.1:1"),
            policy=RolloutPolicy(min_errors=3),
        )
        rollout = Rollout(config.policy, LiveSources(config), serving)
        watching = threading.Thread(target=rollout.run, args=(0.5, stop))
        with load(deployment, num_images=2, steps=2) as running:
            watching.start()
            try:
                eventually(lambda: running.errors or serving.read().canary is None, "it is taken out", 240)
                running.enough(8, len(running.answers))
            finally:
                stop.set()
                watching.join(60)
        assert not running.errors, running.errors[0]
        assert {used(answer) for answer in running.answers} == {champion}
        assert counted(deployment, "error", "canary", canary) >= 3
    assert "took out the canary" in caplog.text
