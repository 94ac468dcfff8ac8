"""Job commands against a real Ray cluster by its Jobs API."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ray_jobs.operate.commands import app
from ray_jobs.operate.jobs import FAILED, RUNNING, STOPPED, ClusterError, make_submission
from ray_jobs.operate.ray_api import RayApi
from tests.conftest import ROOT
from tests.ray_jobs.world import write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
WAIT_S = 120


@dataclass(frozen=True)
class Cluster:
    url: str
    process: subprocess.Popen[str]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of our own, with a dashboard; without a token, whatever this machine has."""
    directory = Path(tempfile.mkdtemp(prefix="accord-ray-", dir="/tmp"))  # sockets need a short path
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_DASHBOARD_SUBPROCESS_MODULES_DISABLED": "0",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_head.py")), str(port), str(directory)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=open(directory / "head.log", "w"),  # noqa: SIM115 - the child's from here on
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/api/version"), lambda: (directory / "head.log").read_text())
        yield Cluster(url, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def wait_for(condition: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, explain()
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def slow_recipe(directory: Path) -> Path:
    """A recipe whose stages wait for DIRECTORY/run.release."""
    path = write_recipe(directory, directory, directory)
    content = yaml.safe_load(path.read_text())
    content["evaluator"] = "tests.ray_jobs.operate.slow:evaluator"
    content["name"] = f"slow {directory.name}"
    path.write_text(yaml.safe_dump(content))
    return path


def accord(cluster: Cluster, *arguments: str, code: int = 0) -> str:
    result: Any = CliRunner().invoke(app, ["job", *arguments, "--address", cluster.url])
    assert result.exit_code == code, result.output + repr(result.exception)
    return str(result.output)


def wait_for_output(backend: RayApi, job_id: str, text: str) -> None:
    wait_for(lambda: text in backend.logs(job_id), lambda: str(backend.job(job_id)))


def test_a_job_is_submitted_once_listed_followed_stopped_and_started_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe = slow_recipe(tmp_path)
    first = accord(cluster, "submit", str(recipe), "--stage", "report").split()[-1]
    again = accord(cluster, "submit", str(recipe), "--stage", "report")
    assert f"{first} is there already" in again
    assert again.split()[-1] == first
    other = accord(cluster, "submit", str(recipe), "--stage", "report", "--set", "seed=5").split()[-1]
    assert other.rpartition("-")[0] != first.rpartition("-")[0]
    accord(cluster, "stop", other)

    backend = RayApi(cluster.url)
    wait_for_output(backend, first, "waiting")
    assert "waiting" in accord(cluster, "logs", first)
    listed = json.loads(accord(cluster, "list", "--json"))
    assert [(job["recipe"], job["stage"]) for job in listed if job["id"] == first] == [
        (f"slow {tmp_path.name}", "report")
    ]
    assert first in accord(cluster, "list")

    assert "is being stopped" in accord(cluster, "stop", first)
    wait_for(lambda: backend.job(first).status == STOPPED)
    assert "had ended already: STOPPED" in accord(cluster, "stop", first)

    second = accord(cluster, "submit", str(recipe), "--stage", "report").split()[-1]
    assert second == first.rpartition("-")[0] + "-2"
    (tmp_path / "run.release").touch()
    followed = accord(cluster, "logs", str(recipe), "--follow", code=1)  # the recipe's newest job
    assert followed.count("waiting") == followed.count("let go") == 1, followed
    assert "evaluation is not there yet" in followed  # the stage's own error, as it wrote it
    assert f"The job {second} ended: FAILED" in followed
    assert backend.job(second).status == FAILED


def test_the_same_id_is_one_job_and_refuses_other_content(cluster: Cluster, tmp_path: Path) -> None:
    recipe = slow_recipe(tmp_path)
    name = f"mine-{os.getpid()}"
    assert accord(cluster, "submit", str(recipe), "--stage", "score", "--id", name).split()[-1] == name
    assert accord(cluster, "submit", str(recipe), "--stage", "score", "--id", name).split()[-1] == name
    for changed in (["--stage", "collect"], ["--stage", "score", "--set", "seed=7"]):
        refused = accord(cluster, "submit", str(recipe), *changed, "--id", name, code=2)
        assert f"the id '{name}' was used for another job" in refused
        assert "--id" in refused

    # Of two at once, neither of which sees the other's, one starts the job.
    submission = make_submission(recipe, "judge", job_id=f"{name}-2")
    backend = RayApi(cluster.url)
    start = threading.Barrier(2)
    seen = RayApi.jobs

    class Late(RayApi):
        waited = False

        def jobs(self) -> list[Any]:
            found = seen(self)
            if not self.waited:
                self.waited = True
                start.wait(WAIT_S)
            return found

    results: list[tuple[str, bool]] = []

    def submit(late: Late) -> None:
        job, new = late.submit(submission)
        results.append((job.id, new))

    threads = [threading.Thread(target=submit, args=(Late(cluster.url),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(results) == [(f"{name}-2", False), (f"{name}-2", True)]
    for job in (name, f"{name}-2"):
        backend.stop(job)


def test_what_is_wrong_is_known_before_anything_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    recipe = slow_recipe(tmp_path)
    before = {job.id for job in RayApi(cluster.url).jobs()}  # others may still be stopping
    assert "cannot read the config" in accord(cluster, "submit", str(tmp_path / "absent.yaml"), code=2)
    assert "unknown key 'sed'" in accord(cluster, "submit", str(recipe), "--set", "sed=1", code=2)
    assert "expected one of loop, collect" in accord(
        cluster, "submit", str(recipe), "--stage", "cook", code=2
    )
    assert "is no id for a job" in accord(cluster, "submit", str(recipe), "--id", "My job", code=2)
    for command in ("logs", "stop"):
        refused = accord(cluster, command, "no-such-job", code=2)
        assert "there is no job 'no-such-job'" in refused
        assert "accord job list" in refused
    assert "has no job of the recipe" in accord(cluster, "logs", str(recipe), code=2)
    assert {job.id for job in RayApi(cluster.url).jobs()} == before


def test_a_stage_with_the_address_of_a_jobs_api_becomes_a_job(cluster: Cluster, tmp_path: Path) -> None:
    recipe = slow_recipe(tmp_path)
    (tmp_path / "run.release").touch()
    command = [sys.executable, "-m", "ray_jobs.report", "--recipe", str(recipe), "--address", cluster.url]
    # Addresses in the environment are not meant: Ray would follow them.
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:9", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "evaluation is not there yet" in done.stdout
    assert "ended: FAILED" in done.stderr


def test_dry_run_prints_what_would_be_sent(tmp_path: Path) -> None:
    recipe = slow_recipe(tmp_path)
    arguments = ["job", "submit", str(recipe), "--dry-run", "--address", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, arguments)
    sent = yaml.safe_load(result.output)
    assert sent["runtime_env"]["working_dir"]["recipe.yaml"] == recipe.read_text()
    assert sent["entrypoint"].startswith("python -m ray_jobs.loop --recipe recipe.yaml --run-dir /")


@pytest.mark.parametrize(
    ("code", "answer"), [(401, "Unauthorized: missing token"), (403, "Forbidden: token")]
)
def test_a_cluster_that_wants_a_token_is_told_from_one_that_is_gone(code: int, answer: str) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN"):
            RayApi(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_head_without_its_agent_is_told_with_what_to_do(cluster: Cluster) -> None:
    api = RayApi(cluster.url)
    with pytest.raises(ClusterError, match="--dashboard-agent-listen-port"), api._errors():
        raise RuntimeError("Request failed with status code 500: No available agent to submit job")


def test_z_a_cluster_that_goes_away_half_way_is_told_with_what_to_do(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The last one: it ends the cluster."""
    recipe = slow_recipe(tmp_path)
    backend = RayApi(cluster.url)
    job, _ = backend.submit(make_submission(recipe, "report"))
    written: list[str] = []
    errors: list[Exception] = []

    def follow() -> None:
        try:
            backend.follow(job.id, written.append)
        except ClusterError as error:
            errors.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    wait_for(lambda: "waiting" in "".join(written), lambda: str(backend.job(job.id)))
    assert backend.job(job.id).status == RUNNING
    cluster.end()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert "went away while the job" in str(errors[0])
    assert "give the same command" in str(errors[0])
    refused = accord(cluster, "list", code=2)
    assert "no Ray Jobs API answers" in refused
    assert "ray start --head" in refused
