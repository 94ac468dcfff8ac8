"""What the rollout does: to what serves, by Serve's REST API or in memory, and to a real registry."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from accord.config import load_yaml
from accord.registry.gate import DIFFUSION
from accord.registry.registry import CANARY, Registry, RegistryError
from accord.registry.rollout import Action, Observed, RolloutPolicy
from accord.registry.runs import find_models
from accord.registry.settings import GateConfig
from services.rollout.config import RolloutConfig, ServeEndpoint
from services.rollout.metrics import RolloutMetrics
from services.rollout.serving import ServeApi
from services.rollout.sources import SourceError
from services.rollout.user_configs import UserConfigs
from services.rollout.watch import Rollout
from tests.registry.run import GOOD, write_run

GENERATION = {"models": {"base": "/models/7", "next": "/models/8"}, "default": "base"}
GATEWAY = {"canary": {"model": "next", "share": 0.1}, "sampler": {"steps": 30}}
FINE = Observed(ok=2000, latency_s=1.0, good=1600, bad=400)
BAD = Observed(ok=10, errors=90)


class Kept:
    """An application in memory."""

    def __init__(self) -> None:
        self.configs = UserConfigs(copy.deepcopy(GENERATION), copy.deepcopy(GATEWAY))

    def read(self) -> UserConfigs:
        return self.configs

    def write(self, configs: UserConfigs) -> None:
        self.configs = configs


class Known:
    """Sources that say what they were told to."""

    def __init__(self, canary: Observed, champion: Observed = FINE, **digests: str) -> None:
        self.seen, self.loaded = (champion, canary), digests or {"base": "a" * 64, "next": "b" * 64}

    def digests(self) -> dict[str, str]:
        return self.loaded

    def observe(self, champion: str, canary: str) -> tuple[Observed, Observed]:
        assert (champion, canary) == (self.loaded["base"], self.loaded["next"])
        return self.seen


def test_a_bad_canary_is_taken_out_and_the_rest_stays() -> None:
    serving = Kept()
    rollout = Rollout(RolloutPolicy(), Known(BAD), serving)
    decision = rollout.step()
    assert decision is not None
    assert decision.action is Action.TAKE_OUT
    assert serving.configs == UserConfigs(GENERATION, {"canary": None, "sampler": {"steps": 30}})
    assert rollout.step() is None


def test_a_good_canary_becomes_the_default_once_it_is_old_enough() -> None:
    serving, now = Kept(), [100.0]
    rollout = Rollout(RolloutPolicy(min_age_s=60), Known(FINE), serving, clock=lambda: now[0])
    first = rollout.step()
    assert first is not None
    assert first.why.startswith("watched for 0 s of 60")
    now[0] += 60
    second = rollout.step()
    assert second is not None
    assert second.action is Action.PROMOTE
    assert serving.configs.champion == "next"
    assert serving.configs.canary is None
    assert serving.configs.generation["models"] == GENERATION["models"]


def test_another_model_under_the_same_alias_is_another_canary() -> None:
    serving, now = Kept(), [0.0]
    sources = Known(FINE)
    rollout = Rollout(RolloutPolicy(min_age_s=60), sources, serving, clock=lambda: now[0])
    rollout.step()
    now[0], sources.loaded = 61.0, {"base": "a" * 64, "next": "c" * 64}
    decision = rollout.step()
    assert decision is not None
    assert decision.action is Action.WAIT


@pytest.mark.parametrize(
    ("gateway", "digests"),
    [
        ({}, {}),
        ({"canary": None}, {}),
        ({"canary": {"model": "next", "share": 0.0}}, {}),
        ({"canary": {"model": "base", "share": 0.5}}, {}),
        (GATEWAY, {"base": "a" * 64}),  # not loaded yet
    ],
)
def test_without_a_canary_nothing_is_done(gateway: dict[str, Any], digests: dict[str, str]) -> None:
    serving = Kept()
    serving.configs = UserConfigs(GENERATION, gateway)
    assert Rollout(RolloutPolicy(), Known(BAD, **digests), serving).step() is None
    assert serving.configs.gateway == gateway


def test_the_loop_outlives_what_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()

    class Away(Known):
        calls = 0

        def observe(self, champion: str, canary: str) -> tuple[Observed, Observed]:
            self.calls += 1
            if self.calls < 3:
                raise SourceError("Prometheus is away")
            stop.set()
            return self.seen

    serving = Kept()
    Rollout(RolloutPolicy(), Away(BAD), serving).run(0.01, stop)
    assert serving.configs.canary is None
    assert caplog.text.count("Prometheus is away") == 1


@pytest.fixture
def registry(tmp_path: Path, empty_store: bytes) -> Registry:
    """With a champion, version 1, and a canary, version 2, that passes its gate, and 3 that does not."""
    (tmp_path / "models.db").write_bytes(empty_store)
    opened = Registry(f"sqlite:///{tmp_path / 'models.db'}")
    bad = {**GOOD, "readable": {"base": {"value": 0.9}, "aligned": {"value": 0.1}}}
    for content, summary in (("one", GOOD), ("two", GOOD), ("three", bad)):
        for model in find_models(write_run(tmp_path / content, content, summary)):
            opened.register("accord", model, "tiny", GateConfig())
    opened.promote("accord-diffusion/1", by="olga", why="first")
    return opened


def test_the_registry_moves_with_what_serves(registry: Registry) -> None:
    name = "accord-diffusion"
    digests = {number: registry.get(f"{name}/{number}").digest for number in (1, 2, 3)}
    registry.promote(f"{name}/2", by="olga", why="try it", alias=CANARY)

    def rollout(canary: Observed, number: int) -> tuple[Rollout, Kept]:
        serving = Kept()
        sources = Known(canary, base=digests[1], next=digests[number])
        return Rollout(RolloutPolicy(min_age_s=0), sources, serving, registry, name), serving

    bad, serving = rollout(BAD, 2)
    bad.step()
    assert serving.configs.canary is None
    assert registry.get(f"{name}/2").aliases == ()
    last = registry.history(name)[-1]
    assert (last.action, last.alias, last.by) == ("rollback", "canary", "services.rollout")
    assert "errors 90 of 100" in last.why

    refused, serving = rollout(FINE, 3)  # the gate does not let it pass
    with pytest.raises(RegistryError, match="does not pass its gate"):
        refused.step()
    assert serving.configs.champion == "base"

    registry.promote(f"{name}/2", by="olga", why="once more", alias=CANARY)
    good, serving = rollout(FINE, 2)
    good.step()
    assert serving.configs.champion == "next"
    assert registry.get(f"{name}/2").aliases == ("champion",)


def test_what_it_does_and_whether_the_registry_agrees_is_told(registry: Registry) -> None:
    name, told, stop, now = "accord-diffusion", RolloutMetrics(), threading.Event(), [0.0]
    digests = {number: registry.get(f"{name}/{number}").digest for number in (1, 2)}
    serving = Kept()

    class Once(Known):
        """Is away at first, and looks twice then."""

        looks = 0

        def digests(self) -> dict[str, str]:
            self.looks += 1
            now[0] += 40
            if self.looks == 1:
                raise SourceError("the gateway is away")
            if self.looks >= 6:
                stop.set()
            return self.loaded

    def value(series: str, **labels: str) -> float | None:
        return told.registry.get_sample_value(f"accord_rollout_{series}", labels)

    sources = Once(BAD, base=digests[2], next="c" * 64)  # version 2 serves, 1 is champion
    rollout = Rollout(RolloutPolicy(), sources, serving, registry, name, clock=lambda: now[0], metrics=told)
    rollout.run(0.001, stop)
    assert value("looks_total", outcome="failed") == 1
    assert (value("looks_total", outcome="looked") or 0) >= 2
    assert value("moves_total", action="take_out") == 1
    assert value("moves_total", action="promote") == 0
    assert value("champion_disagrees") == 1
    assert (value("last_look_timestamp_seconds") or 0) > 1e9
    registry.promote(f"{name}/2", by="olga", why="it serves")
    stop.clear()
    now[0] += 100
    rollout.run(0.001, stop)
    assert value("champion_disagrees") == 0


def test_old_versions_leave_the_table_and_nothing_else_does() -> None:
    table = {
        "models": {"base": "/b", **{f"accord-diffusion-{n}": f"/{n}" for n in range(1, 5)}},
        "default": "base",
    }
    configs = UserConfigs(table, {}).with_canary("accord-diffusion-2", 0.1)
    configs = configs.with_default(DIFFUSION, "accord-diffusion-4")
    left = configs.without_old(DIFFUSION, "accord-diffusion", {"accord-diffusion-3"}).table(DIFFUSION)
    assert set(left.models) == {"base", *(f"accord-diffusion-{n}" for n in (2, 3, 4))}
    assert configs.with_default(DIFFUSION, "accord-diffusion-2").canary is None


class Dashboard(ThreadingHTTPServer):
    """Serve's REST API as far as the rollout uses it: it takes what Ray's own schema takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.config: dict[str, Any] = {
            "proxy_location": "EveryNode",
            "grpc_options": {"port": 9000},
            "applications": [
                {
                    "name": "accord",
                    "route_prefix": "/",
                    "import_path": "services.app:build",
                    "args": {"environment": "/etc/accord/serve.yaml"},
                    "deployments": [{"name": "Generation", "num_replicas": 3, "user_config": GENERATION}],
                },
                {"name": "other", "route_prefix": "/other", "import_path": "other:app"},
            ],
        }
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def details(self) -> dict[str, Any]:
        def in_effect(config: dict[str, Any], name: str, initial: dict[str, Any]) -> dict[str, Any]:
            overrides = {one["name"]: one for one in config.get("deployments", [])}
            user_config = overrides.get(name, {}).get("user_config", initial)
            return {"deployment_config": {"name": name, "user_config": user_config}}

        applications = {
            one["name"]: {
                "status": "RUNNING",
                "deployed_app_config": one,
                "deployments": {
                    "Generation": in_effect(one, "Generation", GENERATION),
                    "Gateway": in_effect(one, "Gateway", GATEWAY),
                },
            }
            for one in self.config["applications"]
        }
        return {**self.config, "applications": applications, "http_options": None}


class Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        self._answer(200, self.server.details())

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ServeDeploySchema.model_validate(body)
        self.server.config = body
        self._answer(200, None)

    def _answer(self, status: int, body: Any) -> None:
        self.server.tokens.append(self.headers.get("authorization"))
        if self.path != "/api/serve/applications/":
            status = 404
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    server = Dashboard()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_serves_rest_api_is_given_the_whole_config_with_two_parts_changed(
    dashboard: Dashboard, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret-word")
    api = ServeApi(ServeEndpoint(url=dashboard.url, token_file=str(tmp_path / "token")))
    before = copy.deepcopy(dashboard.config)
    assert api.read() == UserConfigs(GENERATION, GATEWAY)
    api.write(api.read().promoted())
    after = dashboard.config
    assert api.read().champion == "next"
    assert api.read().canary is None
    assert set(dashboard.tokens) == {"Bearer secret-word"}
    application = after["applications"][0]
    assert application["deployments"] == [
        {"name": "Generation", "num_replicas": 3, "user_config": {**GENERATION, "default": "next"}},
        {"name": "Gateway", "user_config": {**GATEWAY, "canary": None}},
    ]
    application["deployments"] = before["applications"][0]["deployments"]
    assert after == before


def test_what_the_rest_api_cannot_do_is_told(dashboard: Dashboard) -> None:
    with pytest.raises(SourceError, match="no application 'none'"):
        ServeApi(ServeEndpoint(url=dashboard.url, application="none")).read()
    with pytest.raises(SourceError, match="404"):
        ServeApi(ServeEndpoint(url=f"{dashboard.url}/wrong")).read()
    with pytest.raises(SourceError, match="failed"):
        ServeApi(ServeEndpoint(url="http://127.0.0.1:1")).read()


@pytest.mark.parametrize("name", ["rollout.yaml", "manage.yaml"])
def test_a_documented_config_is_one(root: Path, tmp_path: Path, name: str) -> None:
    text = (root / "docs" / "operate.md").read_text()
    block = text.split(f"```yaml\n# {name}\n")[1].split("```")[0]
    (tmp_path / name).write_text(block)
    config = load_yaml(RolloutConfig, tmp_path / name)
    assert config.policy.min_verdicts == 100
    assert config.registry is not None
    assert config.registry.model == "accord-diffusion"
