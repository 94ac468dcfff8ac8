"""Tracking: one run, however often it was interrupted, and never in the way."""

import math
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from accord.errors import StorageError
from accord.tracking import flatten, track


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests here: to make one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/sub/mlflow.db"


def steps(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def test_a_run_is_resumed(uri: str, tmp_path: Path) -> None:
    id_file = tmp_path / "run_id"
    client = MlflowClient(tracking_uri=uri)
    params = {"finetune": {"lr": 0.1, "betas": (0.9, 0.99)}, "seed": 3}
    with (
        pytest.raises(KeyboardInterrupt),
        track(uri, "resume", "aligned", id_file, params, {"stage": "finetune"}) as run,
    ):
        run.log(1, loss=torch.tensor(0.5), reward=float("nan"))
        raise KeyboardInterrupt
    found = client.get_run(id_file.read_text())
    assert found.info.status == "KILLED"
    assert found.info.run_name == "aligned"
    assert found.data.params == {"finetune.lr": "0.1", "finetune.betas": "[0.9,0.99]", "seed": "3"}
    assert found.data.tags["stage"] == "finetune"
    assert "reward" not in found.data.metrics

    with track(uri, "resume", "aligned", id_file, params, {}) as again:
        assert again.run_id == run.run_id
        assert client.get_run(run.run_id).info.status == "RUNNING"
        again.log(2, loss=0.25)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert steps(client, run.run_id, "loss") == [(1, 0.5), (2, 0.25)]


def test_a_run_whose_store_is_gone_begins_anew(uri: str, tmp_path: Path) -> None:
    id_file = tmp_path / "run_id"
    id_file.write_text("0" * 32)
    with track(uri, "anew", "x", id_file, {}) as run:
        run.log(0, loss=1.0)
    assert id_file.read_text() == run.run_id != "0" * 32


def test_a_failure_is_marked(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diverged"), track(uri, "failed", "x", tmp_path / "id", {}) as run:
        raise ValueError("diverged")
    assert MlflowClient(tracking_uri=uri).get_run(run.run_id).info.status == "FAILED"


def test_no_uri_no_tracking(tmp_path: Path) -> None:
    with track("", "e", "x", tmp_path / "id", {}) as run:
        run.log(0, loss=math.inf)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_breaks_does_not_stop_the_run(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track(uri, "breaks", "x", tmp_path / "id", {}) as run:
        run.run_id = "1" * 32  # a run that the store does not know
        run.log(0, loss=1.0)
        run.log(1, loss=1.0)
    assert caplog.text.count("tracking stops, the training goes on") == 1


def test_a_store_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"tracking.uri"),
        track(f"sqlite:///{tmp_path}/file/mlflow.db", "e", "x", tmp_path / "id", {}),
    ):
        pass


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}, "f": "x"}) == {
        "a.b.c": "1",
        "a.d": "[]",
        "e": "{}",
        "f": "x",
    }
    assert len(flatten({"a": "x" * 10_000})["a"]) == 6000
