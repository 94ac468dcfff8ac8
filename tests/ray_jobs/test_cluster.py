"""Errors that crossed Ray are found again, and nothing else is taken for one of ours."""

import json
import os
import subprocess
import sys

import pytest
import torch

from accord.errors import ConfigError, FeedbackError
from accord.recipe import RayConfig
from ray_jobs import _cli, cluster
from tests.conftest import ROOT

LISTENING = """
import json, os
from accord.recipe import RayConfig
from ray_jobs import cluster
from tests.listening import elsewhere, listening
with cluster.connect():
    cluster.ensure(RayConfig(num_cpus=1))
    print(json.dumps([len(listening(os.getpid())), sorted(elsewhere(os.getpid()))]))
"""


@pytest.mark.cluster
def test_a_cluster_of_our_own_can_be_reached_from_this_machine_alone() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in (cluster.ADDRESS_VARIABLE, *cluster.LOCAL_ENVIRONMENT):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ports, reachable = json.loads(done.stdout)
    assert ports > 5  # its processes do listen
    assert reachable == []


def test_an_error_of_a_training_worker_is_found() -> None:
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    inner = FeedbackError("only good labels")
    assert cluster.accord_error(WorkerGroupError("rank 1", {1: inner})) is inner
    assert cluster.accord_error(ControllerError(WorkerGroupError("rank 1", {1: inner}))) is inner


def test_an_error_of_a_task_is_found_without_its_remote_traceback() -> None:
    from ray.exceptions import RayTaskError

    inner = ConfigError("no such scheduler")
    crossed = RayTaskError("generate", "Traceback ...", inner).as_instanceof_cause()
    assert cluster.accord_error(crossed) is inner


def test_full_memory_is_told_with_what_to_do() -> None:
    from ray.exceptions import OutOfMemoryError, RayTaskError
    from ray.train.v2.api.exceptions import WorkerGroupError

    machine = OutOfMemoryError(
        "8 workers were killed. Memory on the node (ID: 5a) was 22.5GB used / 23.5GB limit"
    )
    told = str(cluster.accord_error(machine))
    assert "memory was full (22.5GB of 23.5GB were used)" in told
    assert "the same command goes on" in told
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    crossed = RayTaskError("train", "Traceback ...", gpu).as_instanceof_cause()
    for error in (gpu, crossed, WorkerGroupError("rank 0", {0: gpu})):
        told = str(cluster.accord_error(error))
        assert "a GPU's memory was full" in told
        assert "gradient_accumulation" in told
    assert cluster.accord_error(MemoryError()) is None


def test_a_bug_stays_a_bug() -> None:
    assert cluster.accord_error(ValueError("boom")) is None
    bug = KeyError("a bug in the handler of an error of ours")
    bug.__context__ = FeedbackError("handled")
    assert cluster.accord_error(bug) is None


def test_room_counts_workers_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    assert cluster.has_room(RayConfig(num_workers=2), 2)
    assert not cluster.has_room(RayConfig(num_workers=3), 2)
    assert not cluster.has_room(RayConfig(num_workers=2, threads_per_worker=2), 2)
    assert not cluster.has_room(RayConfig(gpus_per_worker=1), 2)


def test_the_chosen_address_is_forgotten_afterwards() -> None:
    with cluster.connect("host:6379"):
        assert os.environ[cluster.ADDRESS_VARIABLE] == "host:6379"
    assert cluster.ADDRESS_VARIABLE not in os.environ


def test_known_errors_end_in_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ConfigError("the recipe has no panel")

    assert _cli.guarded(fail) == 2
    shown = capsys.readouterr().err
    assert "Error: the recipe has no panel" in shown
    assert "Traceback" not in shown


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCORD_COMMAND", raising=False)
    monkeypatch.setattr("sys.argv", ["/x/ray_jobs/collect.py", "--recipe", "my recipe.yaml", "--fresh"])

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert _cli.guarded(interrupted) == 130
    shown = capsys.readouterr().err
    assert "python -m ray_jobs.collect --recipe 'my recipe.yaml'" in shown
    assert "--fresh" not in shown

    monkeypatch.setenv("ACCORD_COMMAND", "accord collect --recipe mine.yaml --fresh")
    assert _cli.guarded(interrupted) == 130
    assert "  accord collect --recipe mine.yaml\n" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    def bug() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _cli.guarded(bug)
