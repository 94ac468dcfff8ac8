"""Job commands with the real Kubernetes client against a small API that checks bodies by the real schemas."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from accord.errors import ConfigError
from ray_jobs.operate.commands import app
from ray_jobs.operate.jobs import STAGES, ClusterError, make_submission
from ray_jobs.operate.kube import Kubernetes
from ray_jobs.operate.rayjob import build, load_template
from tests.conftest import ROOT
from tests.ray_jobs.operate.kube_server import KubernetesServer, problems
from tests.ray_jobs.world import write_recipe

TEMPLATE = ROOT / "k8s" / "jobs" / "template" / "rayjob.yaml"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    running = KubernetesServer()
    monkeypatch.setenv("KUBECONFIG", str(running.write_kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setattr("ray_jobs.operate.kube._POLL_S", 0.05)
    yield running
    running.close()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tmp_path, tmp_path)


def accord(*arguments: str, code: int = 0) -> str:
    result: Any = CliRunner().invoke(app, ["job", *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return str(result.output)


def submit(recipe: Path, *arguments: str, code: int = 0) -> str:
    return accord("submit", str(recipe), "--kubernetes", *arguments, code=code)


def test_a_recipe_is_one_rayjob_with_its_recipe_mounted(server: KubernetesServer, recipe: Path) -> None:
    name = submit(recipe, "--stage", "finetune", "--set", "finetune.steps=9").split()[-1]
    assert submit(recipe, "--stage", "finetune", "--set", "finetune.steps=9").split()[-1] == name
    (job,) = server.jobs.values()
    (config,) = server.config_maps.values()
    assert config["data"] == {"recipe.yaml": recipe.read_text()}
    assert config["metadata"]["ownerReferences"][0]["uid"] == f"uid-of-{name}"
    assert "--set finetune.steps=9" in job["spec"]["entrypoint"]
    assert "--recipe /etc/accord/recipe/recipe.yaml" in job["spec"]["entrypoint"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "recipe", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    assert head["containers"][0]["volumeMounts"][-1]["mountPath"] == "/etc/accord/recipe"
    listed = json.loads(accord("list", "--kubernetes", "--json"))
    assert [(found["id"], found["stage"], found["recipe"]) for found in listed] == [
        (name, "finetune", "tiny")
    ]


def test_the_run_directory_is_on_the_disk_that_outlives_the_cluster(recipe: Path) -> None:
    for given, there in (("runs/demo", "/runs/demo"), ("/shared/x", "/shared/x")):
        submission = make_submission(recipe, run_dir=given)
        job = build(submission, "x", "accord", load_template(None, "loop"))
        assert f"--run-dir {there} " in job["spec"]["entrypoint"]


def test_the_same_id_refuses_other_content_and_a_cut_off_submission_is_completed(
    server: KubernetesServer, recipe: Path
) -> None:
    submit(recipe, "--id", "mine")
    assert "was used for another job" in submit(recipe, "--id", "mine", "--set", "seed=9", code=2)
    server.config_maps.clear()  # as if the first had been killed before its second request
    submit(recipe, "--id", "mine")
    assert list(server.config_maps) == ["mine-recipe"]
    assert list(server.jobs) == ["mine"]


def test_of_two_that_submit_at_once_one_makes_the_job(
    server: KubernetesServer, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = Kubernetes(), Kubernetes()
    submission = make_submission(recipe)
    other = make_submission(recipe, overrides=["seed=8"], job_id=f"{submission.prefix}-2")
    monkeypatch.setattr(slow, "jobs", lambda: [])  # what it saw before the other one submitted
    job, new = fast.submit(submission)
    assert new
    assert slow.submit(submission) == (job, False)
    fast.submit(other)
    with pytest.raises(ClusterError, match="used for another job"):
        slow.submit(make_submission(recipe, overrides=["seed=7"], job_id=f"{submission.prefix}-2"))


def test_a_failed_job_is_started_again_under_the_next_number(server: KubernetesServer, recipe: Path) -> None:
    first = submit(recipe).split()[-1]
    server.set_status(first, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert submit(recipe).split()[-1] == first
    server.set_status(first, jobDeploymentStatus="Failed", reason="AppFailed")
    assert submit(recipe).split()[-1] == first[:-1] + "2"


def test_a_job_is_followed_through_waiting_a_retry_and_its_end(
    server: KubernetesServer, recipe: Path
) -> None:
    name = submit(recipe).split()[-1]
    assert "has no log yet" in accord("logs", name, "--kubernetes", code=2)
    written: list[str] = []
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(Kubernetes().follow(name, written.append)))
    thread.start()

    def wait_for(text: str) -> None:
        until = time.monotonic() + 60
        while text not in "".join(written):
            assert time.monotonic() < until, written
            time.sleep(0.01)

    wait_for("PENDING")
    server.logs["a"] = "one\n"
    server.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="a", jobId="j")
    wait_for("one\n")
    server.logs["a"] += "two\n"
    wait_for("two\n")
    server.set_status(name, jobDeploymentStatus="Retrying", rayClusterName="", jobId="")
    wait_for("Retrying")
    server.logs["b"] = "uno\n"
    server.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="b", jobId="k")
    wait_for("uno\n")
    assert accord("logs", str(recipe), "--kubernetes") == "uno\n"
    server.set_status(
        name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", rayClusterName="b", jobId="k"
    )
    thread.join(60)
    assert ended[0].status == "SUCCEEDED"
    assert "".join(written).count("one\n") == 1
    del server.logs["b"]
    assert "went with its cluster; it ended SUCCEEDED" in accord("logs", name, "--kubernetes", code=2)


def test_stop_deletes_the_job_and_says_that_its_work_is_kept(server: KubernetesServer, recipe: Path) -> None:
    name = submit(recipe).split()[-1]
    assert "what it finished is kept" in accord("stop", name, "--kubernetes")
    assert server.jobs == {}
    refused = accord("stop", name, "--kubernetes", code=2)
    assert f"there is no job '{name}'" in refused
    assert "accord job list" in refused


@pytest.mark.parametrize(
    ("status", "message", "kind", "advice"),
    [
        (
            403,
            "rayjobs.ray.io is forbidden: not for olga",
            "rayjobs",
            "kubectl auth can-i create",
        ),
        (
            403,
            "forbidden: exceeded quota: gpus, used: 8",
            "rayjobs",
            "kubectl describe quota -n accord",
        ),
        (404, 'namespaces "accord" not found', "namespaces", "--namespace"),
        (401, "Unauthorized", "", "Renew the credentials"),
        (409, "the object has been modified", "rayjobs", "there is no job|Give the same command again"),
        (422, "spec.entrypoint: Required value", "rayjobs", "--dry-run"),
        (503, "etcd is not there", "", "503.*Give the same command again later"),
    ],
)
def test_what_the_api_refuses_is_told_with_what_to_do(
    server: KubernetesServer, recipe: Path, status: int, message: str, kind: str, advice: str
) -> None:
    server.fail["POST rayjobs"] = (status, message, kind)
    with pytest.raises(ClusterError, match=advice) as caught:
        Kubernetes().submit(make_submission(recipe))
    assert "cannot create the RayJob" in str(caught.value) or status == 409
    assert server.jobs == {}


def test_no_crd_no_cluster_no_context_and_no_kubeconfig_are_told_apart(
    server: KubernetesServer, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.has_crd = False
    for arguments in (["submit", str(recipe)], ["list"], ["stop", "x"]):
        assert "KubeRay is not installed" in accord(*arguments, "--kubernetes", code=2)
    assert "does not answer" in accord("list", "--kubernetes", "--context", "gone", code=2)
    assert "--context" in accord("list", "--kubernetes", "--context", "nowhere", code=2)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    assert "$KUBECONFIG" in accord("list", "--kubernetes", code=2)
    assert "where? Give --address" in accord("list", code=2)


def test_a_recipe_map_that_may_not_be_created_is_told(server: KubernetesServer, recipe: Path) -> None:
    server.fail["POST configmaps"] = (403, "configmaps is forbidden", "configmaps")
    assert "create configmaps" in submit(recipe, code=2)
    del server.fail["POST configmaps"]
    submit(recipe)  # goes on where it was refused
    assert len(server.jobs) == len(server.config_maps) == 1


def test_dry_run_prints_objects_that_the_schemas_know_without_a_cluster(recipe: Path) -> None:
    for stage in STAGES:
        objects = list(yaml.safe_load_all(accord("submit", str(recipe), "--dry-run", "--stage", stage)))
        assert [found["kind"] for found in objects] == ["RayJob", "ConfigMap"]
        assert [problems(found) for found in objects] == [[], []]
        assert objects[1]["data"]["recipe.yaml"] == recipe.read_text()


def test_the_check_of_bodies_finds_what_is_wrong(recipe: Path) -> None:
    job = build(make_submission(recipe), "x", "accord", load_template(None, "loop"))
    rules = {"deletionRules": [{"policy": "DeleteAll"}]}
    for change in ({"entrypint": "x"}, {"backoffLimit": "many"}, {"deletionStrategy": rules}):
        wrong = copy.deepcopy(job)
        wrong["spec"].update(change)
        assert problems(wrong) != []
    assert problems({**job, "metadata": {"name": "x" * 48}}) != []


def test_a_template_that_kustomize_wrote_gives_the_stage_s_own(recipe: Path, tmp_path: Path) -> None:
    ours = yaml.safe_load(TEMPLATE.read_text())
    built = []
    for stage in ("loop", "learn-reward"):
        job = copy.deepcopy(ours)
        job["metadata"]["name"] = stage
        job["metadata"]["labels"]["accord.dev/stage"] = stage
        job["spec"]["activeDeadlineSeconds"] = 77
        job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = (
            "r/t:1"
        )
        built.append(job)
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump_all(built))
    arguments = ["submit", str(recipe), "--dry-run", "--template", str(path), "--stage"]
    found = yaml.safe_load(accord(*arguments, "learn-reward").split("---")[0])
    assert found["metadata"]["name"].startswith("accord-learn-reward-")
    assert found["spec"]["activeDeadlineSeconds"] == 77
    (worker,) = found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["image"] == "r/t:1"
    with pytest.raises(ConfigError, match="holds 0 RayJobs"):
        load_template(path, "collect")
    with pytest.raises(ConfigError, match="cannot read the template"):
        load_template(tmp_path / "absent.yaml", "loop")
