"""What serves on Kubernetes is changed in the RayService, by the real client; the API is a small server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from accord.config import load_yaml
from accord.registry.gate import DIFFUSION, REWARD
from services.rollout.config import RolloutConfig, ServeEndpoint
from services.rollout.serving import Serving, open_serving
from services.rollout.sources import SourceError
from tests.k8s.manifests import K8S, build, named
from tests.k8s.schemas import problems

PATH = "/apis/ray.io/v1/namespaces/accord/rayservices/accord"


class Api(ThreadingHTTPServer):
    """Holds one RayService; `status` other than 200 is answered to everything."""

    def __init__(self, item: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.item, self.status, self.version = item, 200, 7
        item["metadata"]["resourceVersion"] = "7"
        self.patches: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self._answer(self.server.status if self.path == PATH else 404)

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["content-type"] != "application/merge-patch+json":
            self._answer(415)
        elif body["metadata"]["resourceVersion"] != str(self.server.version):
            self._answer(409)
        else:
            self.server.patches.append(body)
            self.server.version += 1
            self.server.item["metadata"]["resourceVersion"] = str(self.server.version)
            self.server.item["spec"].update(body["spec"])
            self._answer(200)

    def _answer(self, status: int) -> None:
        body = self.server.item if status == 200 else {"kind": "Status", "code": status}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(params=["base", "overlays/production"])
def api(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    server = Api(named(build(request.param), "RayService", "accord"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "olga", "user": {"token": "a-token"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "olga"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join(30)


def serving(**changed: str) -> Serving:
    return open_serving(ServeEndpoint(rayservice="accord", **changed))


def test_what_serves_is_changed_and_nothing_else(api: Api) -> None:
    before = yaml.safe_load(api.item["spec"]["serveConfigV2"])
    there = serving()
    configs = there.read()
    assert configs.champion in configs.table(DIFFUSION).models
    assert configs.gateway["limits"]["request_timeout_s"] == 280
    wanted = configs.with_model(DIFFUSION, "accord-diffusion-2", "/runs/r/aligned")
    wanted = wanted.with_model(REWARD, "accord-reward-2", "/runs/r/reward").with_default(
        REWARD, "accord-reward-2"
    )
    there.write(wanted.with_canary("accord-diffusion-2", 0.1))
    again = there.read()
    assert again.canary is not None
    assert (again.canary.model, again.canary.share) == ("accord-diffusion-2", 0.1)
    assert again.table(REWARD).default == "accord-reward-2"
    there.write(again.promoted())
    assert there.read().champion == "accord-diffusion-2"
    assert there.read().canary is None
    assert [set(patch["spec"]) for patch in api.patches] == [{"serveConfigV2"}] * 2
    after = yaml.safe_load(api.item["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(after)
    assert problems({**api.item, "metadata": {"name": "accord"}}) == []
    (old,), (new,) = before.pop("applications"), after.pop("applications")
    for one in old["deployments"], new["deployments"]:
        for deployment in one:
            deployment.pop("user_config", None)
    assert (before, old) == (after, new)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "renew the credentials"), (403, "needs get and patch"), (404, "is not there"), (500, "500")],
)
def test_what_the_api_refuses_is_told(api: Api, status: int, message: str) -> None:
    api.status = status
    with pytest.raises(SourceError, match=message):
        serving().read()


def test_a_change_of_somebody_else_is_not_overwritten(api: Api) -> None:
    there = serving()
    configs = there.read()
    get = there._get  # type: ignore[attr-defined]
    there._get = lambda: (get(), setattr(api, "version", 9))[0]  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match="somebody changed it meanwhile"):
        there.write(configs.without_canary())


def test_what_somebody_else_moved_is_not_moved_back(api: Api) -> None:
    rollout, hand = serving(), serving()
    configs = rollout.read()  # the rollout looks, and asks Prometheus for a while
    hand.write(hand.read().with_model(DIFFUSION, "next", "/runs/r/aligned").with_canary("next", 0.1))
    with pytest.raises(SourceError, match="somebody changed it meanwhile"):
        rollout.write(configs.without_canary())
    api.version += 1  # as each report of the status does
    api.item["metadata"]["resourceVersion"] = str(api.version)
    rollout.write(rollout.read().without_canary())
    assert hand.read().canary is None
    assert "next" in hand.read().table(DIFFUSION).models


def test_a_context_that_is_not_there_and_a_config_that_cannot_be_read_are_told(api: Api) -> None:
    with pytest.raises(SourceError, match="no Kubernetes cluster to ask"):
        serving(context="nowhere")
    api.item["spec"]["serveConfigV2"] = "applications: ["
    with pytest.raises(SourceError, match="no serveConfigV2 that can be read"):
        serving().read()
    api.item["spec"]["serveConfigV2"] = "applications: [{name: other}]"
    with pytest.raises(SourceError, match="no application 'accord'"):
        serving().read()


def test_the_component_is_one_that_the_rollout_can_run_by() -> None:
    config = load_yaml(RolloutConfig, K8S / "components" / "rollout" / "config.yaml")
    manifests = build("overlays/everything")
    role = named(manifests, "Role", "accord-rollout")["rules"][0]
    assert (role["resourceNames"], role["verbs"]) == ([config.serve.rayservice], ["get", "patch"])
    pod = named(manifests, "Deployment", "rollout")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert config.metrics_port == container["ports"][0]["containerPort"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.feedback is not None
    for endpoint in (config.gateway, config.feedback):
        assert str(Path(endpoint.token_file).parent) in mounts
    services = {m["metadata"]["name"] for m in manifests if m["kind"] == "Service"} | {"accord-serve-svc"}
    for url in (config.gateway.url, config.feedback.url, config.registry.url.get_secret_value()):  # type: ignore[union-attr]
        assert re.sub(r"^\w+://|:\d+$", "", url) in services


def test_what_gateways_record_with_is_mounted_and_goes_where_it_can_be_kept() -> None:
    manifests = build("overlays/production")
    service = named(manifests, "RayService", "accord")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    record = application["args"]["gateway"]["user_config"]["record"]
    pod = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert str(Path(record["token_file"]).parent) in mounts
    feedback = named(manifests, "Deployment", "feedback")["spec"]["template"]["spec"]["containers"][0]
    (runs,) = [mount for mount in feedback["volumeMounts"] if mount["mountPath"] == "/runs"]
    assert not runs.get("readOnly")
