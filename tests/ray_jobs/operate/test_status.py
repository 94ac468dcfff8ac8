"""`accord status`: what answers is shown, what does not is named."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from accord.local_servers import LocalServer, announced, local_servers
from accord.registry.registry import Registry
from accord.registry.runs import find_models
from accord.registry.settings import GateConfig
from ray_jobs.operate.commands import app
from tests.client import server
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
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_address[1]}"
    listener.shutdown()
    listener.server_close()


def status(*arguments: str) -> str:
    result: Any = CliRunner().invoke(app, ["status", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.output)


def test_everything_that_answers_is_shown(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: bytes
) -> None:
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
    monkeypatch.setenv("ACCORD_DATABASE_URL", feedback)  # as `accord feedback` has it
    parts = json.loads(status("--registry", store, "--address", dashboard, "--json"))
    assert parts["feedback"]["judgements"] == 3
    assert set(parts) == {"services", "jobs", "models", "feedback"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ACCORD_TOKEN", "ACCORD_CA_FILE", "ACCORD_JOBS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCORD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_is_missing_is_named_and_stops_nothing(tmp_path: Path, home: Path) -> None:
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


def test_a_server_of_this_machine_is_shown_while_it_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCORD_CA_FILE", str(tmp_path / "of-another-server.pem"))
    monkeypatch.setenv("ACCORD_TOKEN", "of another server")
    registry = ("--registry", f"sqlite:///{tmp_path / 'none.db'}")
    secret = tmp_path / "token"
    secret.write_text(server.TOKEN + "\n")
    with server.serve() as faulty:
        address = faulty.target
        here = LocalServer(address, "tokens.yaml", str(secret), "http://127.0.0.1:1/metrics", os.getpid())
        with announced(here):
            shown = status(*registry)
            assert f"accord serve at {address}: RUNNING (process {os.getpid()}" in shown
            assert f"diffusion base: loaded, default ({'m' * 12})" in shown
            assert "reward reward: loaded (" in shown
            assert faulty.metadata[-1]["authorization"] == f"Bearer {server.TOKEN}"
            assert server.TOKEN not in status(*registry, "--json")
            faulty.faults = [server.Fault(grpc.StatusCode.UNAUTHENTICATED)]
            assert f"accord serve at {address}: RUNNING its models are not known" in status(*registry)
            asked = len(faulty.metadata)
            secret.rename(tmp_path / "moved")
            assert f"its token is no longer in {secret}" in status(*registry)
            assert len(faulty.metadata) == asked  # the environment's token is not for it
            (tmp_path / "moved").rename(secret)
    with announced(here):
        assert f"accord serve at {address}: NOT ANSWERING" in status(*registry)
    assert "no `accord serve` runs on this machine" in status(*registry)


def test_a_server_that_was_killed_is_not_shown(home: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal; from accord.local_servers import *\n"
        "with announced(LocalServer('localhost:1', '', '', '', os.getpid())):\n"
        "    print(len(local_servers()), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n")
    assert len(list((home / "serving").glob("*.json"))) == 1  # it is left
    assert local_servers() == []
    with announced(LocalServer("localhost:2", "", "", "", os.getpid())):  # and swept by the next one
        (path,) = (home / "serving").glob("*.json")
        assert path.name.startswith(f"{os.getpid()}-")


def test_services_and_jobs_of_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = KubernetesServer()
    monkeypatch.setenv("KUBECONFIG", str(cluster.write_kubeconfig(tmp_path / "kubeconfig")))
    deployments = {"Gateway": {"status": "UNHEALTHY", "message": "no GPU"}}
    cluster.services["accord"] = {
        "metadata": {"name": "accord"},
        "status": {
            "conditions": [{"type": "Ready", "status": "False", "message": "no endpoints"}],
            "activeServiceStatus": {
                "applicationStatuses": {"accord": {"serveDeploymentStatuses": deployments}}
            },
        },
    }
    cluster.jobs["mine"] = {
        "metadata": {"name": "mine", "labels": {"accord.dev/stage": "loop"}},
        "status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
    }
    try:
        shown = status("--kubernetes", "--registry", f"sqlite:///{tmp_path / 'none.db'}")
    finally:
        cluster.close()
    assert "accord: NOT READY no endpoints" in shown
    assert "accord/Gateway: UNHEALTHY no GPU" in shown
    assert "mine" in shown
    assert "RUNNING" in shown
