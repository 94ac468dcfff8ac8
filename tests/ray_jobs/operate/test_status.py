"""`accord status`: what answers is shown, what does not is named."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accord.registry.registry import Registry
from accord.registry.runs import find_models
from accord.registry.settings import GateConfig
from ray_jobs.operate.commands import app
from tests.ray_jobs.operate.kube_server import KubernetesServer
from tests.registry.run import GOOD, write_run

SERVE = {
    "applications": {
        "accord": {
            "status": "RUNNING",
            "deployments": {
                "Gateway": {
                    "status": "HEALTHY",
                    "target_num_replicas": 2,
                    "replicas": [{"state": "RUNNING"}, {"state": "STARTING"}],
                },
            },
        }
    }
}


class Dashboard(http.server.BaseHTTPRequestHandler):
    """The three paths of a Ray dashboard that status asks for, as Ray answers them."""

    def do_GET(self) -> None:
        answers = {
            "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": ""},
            "/api/serve/applications/": SERVE,
            "/api/jobs/": [],
        }
        body = json.dumps(answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def status(*arguments: str) -> str:
    result: Any = CliRunner().invoke(app, ["status", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.output)


def test_everything_that_answers_is_shown(dashboard: str, tmp_path: Path, empty_store: bytes) -> None:
    (tmp_path / "models.db").write_bytes(empty_store)
    run = write_run(tmp_path / "run", summary=GOOD)
    store = f"sqlite:///{tmp_path / 'models.db'}"
    registry = Registry(store)
    for model in find_models(run):
        registry.register("accord", model, "tiny", GateConfig())
    registry.promote("accord-diffusion/1", by="olga", why="won")
    feedback = f"sqlite:///{run / 'feedback.db'}"
    arguments = ["--registry", store, "--feedback", feedback, "--judgements-per-image", "2"]
    shown = status(*arguments, "--address", dashboard)
    assert "accord: RUNNING" in shown
    assert "Gateway: HEALTHY, 1 of 2 replicas run" in shown
    assert "Jobs:\n  none" in shown
    assert "accord-diffusion/1 is champion" in shown
    assert "accord-reward" not in shown  # registered, but does not serve
    assert "1 of 2 images wait for their 2 judgement(s); 3 were given" in shown
    parts = json.loads(status(*arguments, "--address", dashboard, "--json"))
    assert set(parts) == {"services", "jobs", "models", "feedback"}


def test_what_is_missing_is_named_and_stops_nothing(tmp_path: Path) -> None:
    shown = status(
        *("--address", "http://127.0.0.1:9", "--registry", f"sqlite:///{tmp_path / 'none.db'}"),
        *("--feedback", f"sqlite:///{tmp_path / 'none-either.db'}"),
    )
    assert shown.count("not known:") == 4
    assert "no Ray Jobs API answers" in shown
    assert "accord models register" in shown
    assert "no such SQLite file" in shown
    assert list(tmp_path.iterdir()) == []  # looking makes nothing
    assert "env:NOT_THERE" not in status("--feedback", "env:ACCORD_NOT_THERE")


def test_services_and_jobs_of_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = KubernetesServer()
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    deployments = {"Gateway": {"status": "UNHEALTHY", "message": "no GPU"}}
    server.services["accord"] = {
        "metadata": {"name": "accord"},
        "status": {
            "conditions": [{"type": "Ready", "status": "False", "message": "no endpoints"}],
            "activeServiceStatus": {
                "applicationStatuses": {"accord": {"serveDeploymentStatuses": deployments}}
            },
        },
    }
    server.jobs["mine"] = {
        "metadata": {"name": "mine", "labels": {"accord.dev/stage": "loop"}},
        "status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
    }
    try:
        shown = status("--kubernetes", "--registry", f"sqlite:///{tmp_path / 'none.db'}")
    finally:
        server.close()
    assert "accord: NOT READY no endpoints" in shown
    assert "accord/Gateway: UNHEALTHY no GPU" in shown
    assert "mine" in shown
    assert "RUNNING" in shown
