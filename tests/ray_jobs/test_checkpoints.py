"""Checkpoints on the disk: the newest whole one counts, and a write that fails leaves the one before."""

import logging
import resource
import threading
from pathlib import Path

import pytest
import torch

from accord.artifacts import verify
from accord.errors import ArtifactError, ConfigError, StorageError
from accord.recipe import RayConfig
from ray_jobs import checkpoints
from ray_jobs.checkpoints import BackgroundWriter
from ray_jobs.train import train
from tests.ray_jobs.test_train import training
from tests.ray_jobs.training import build

CPU = torch.device("cpu")


def learner(model: Path, **arguments: object) -> object:
    return build(rank=0, world_size=1, wrap=None, device=CPU, model=str(model), **arguments)  # type: ignore[arg-type]


def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = learner(model)
    for step in (1, 2):
        trained.step()  # type: ignore[attr-defined]
        trained.save(checkpoints.path_of(tmp_path, step))  # type: ignore[attr-defined]
    (tmp_path / "step-00000003").mkdir()  # of a writer that was killed: no manifest
    found = checkpoints.newest_first(tmp_path)
    assert [path.name for path in found] == ["step-00000002", "step-00000001"]
    state = found[0] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    again = learner(model)
    with caplog.at_level(logging.WARNING):
        checkpoints.restore(again, found)  # type: ignore[arg-type]
    assert again.step_index == 1  # type: ignore[attr-defined]
    assert "going on from the checkpoint before it" in caplog.text
    with pytest.raises(ArtifactError, match="damaged"):
        checkpoints.restore(learner(model), found[:1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed"):
        checkpoints.restore(learner(model, seed=1), found[1:])  # type: ignore[arg-type]


def test_written_while_training_goes_on_it_is_the_same(tmp_path: Path, model: Path) -> None:
    waiting, going = (
        train(
            [training(str(background), model)],
            tmp_path,
            RayConfig(local=True, background_checkpoints=background),
        )[0]
        for background in (False, True)
    )
    assert verify(waiting).digest == verify(going).digest
    assert len(checkpoints.newest_first(going.parent)) == checkpoints.KEPT


def test_a_full_disk_ends_the_training_and_leaves_the_last_checkpoint(tmp_path: Path, model: Path) -> None:
    (done,) = train([training("full", model)], tmp_path, RayConfig(local=True))
    before = verify(done)
    trained = learner(model)
    trained.load(done)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="no room"), BackgroundWriter() as writer:
        snapshot = trained.snapshot()  # type: ignore[attr-defined]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            writer.write(lambda: snapshot.write(done))
            writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest_first(done.parent)[0] == done
    assert verify(done) == before


def test_one_checkpoint_is_written_at_a_time_and_the_last_is_waited_for() -> None:
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert go_on.wait(60)
        order.append("first")

    with BackgroundWriter() as writer:
        writer.write(first)
        assert begun.wait(60)
        order.append("training")
        go_on.set()
        writer.write(lambda: order.append("second"))
    assert order == ["training", "first", "second"]
