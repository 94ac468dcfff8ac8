"""Any number of workers trains the same model, and so does a training that was interrupted."""

import json
from pathlib import Path

import pytest
import torch

from accord.artifacts import load_tensors
from accord.errors import FeedbackError
from accord.recipe import RayConfig
from ray_jobs import checkpoints
from ray_jobs.train import Training, train
from tests.ray_jobs.training import STEPS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


def training(name: str, model: Path, build: str = "build", **arguments: object) -> Training:
    return Training(
        name=name,
        build=f"tests.ray_jobs.training:{build}",
        arguments={"model": str(model), **arguments},
        steps=STEPS,
        log_every=1,
        checkpoint_every=2,
        title=name,
    )


def test_workers_and_interruptions_change_nothing(
    tmp_path: Path, model: Path, ray_cluster: RayConfig
) -> None:
    mortal = training("mortal", model, dies_after=5, grave=str(tmp_path / "grave"))
    whole, resumed = train([training("whole", model), mortal], tmp_path, ray_cluster)
    # Of one to three workers the cluster has room for two.
    elastic = ray_cluster.model_copy(update={"min_workers": 1, "num_workers": 3})
    killed = training("shared", model, dies_after=3, grave=str(tmp_path / "grave of two"))
    (shared,) = train([killed], tmp_path, elastic)
    assert (tmp_path / "grave").exists()
    assert (tmp_path / "grave of two").exists()

    expected, same, close = (load_tensors(path / "state.safetensors") for path in (whole, resumed, shared))
    assert expected.keys() == same.keys() == close.keys()
    for name, tensor in expected.items():
        assert torch.equal(same[name], tensor), name
        torch.testing.assert_close(close[name], tensor, rtol=1e-3, atol=1e-5)

    here = ray_cluster.model_copy(update={"local": True})
    (alone,) = train([training("here", model)], tmp_path, here)
    for name, tensor in load_tensors(alone / "state.safetensors").items():
        assert torch.equal(expected[name], tensor), name

    losses = [json.loads((tmp_path / name / "progress.json").read_text()) for name in ("whole", "shared")]
    assert losses[0]["step"] == losses[1]["step"] == STEPS
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)


def test_sharded_workers_train_alike_and_hand_on_whole_weights(
    tmp_path: Path, model: Path, ray_cluster: RayConfig
) -> None:
    two = ray_cluster.model_copy(update={"num_workers": 2, "background_checkpoints": True})
    lora = {"parameters": "lora", "lora": {"rank": 4}, "objective": "diffusion_nft"}
    (sharded,) = train([training("sharded", model, sharding="fsdp", **lora)], tmp_path, two)
    (alone,) = train([training("alone", model, **lora)], tmp_path, RayConfig(local=True))
    expected, close = (load_tensors(path / "state.safetensors") for path in (alone, sharded))
    assert expected.keys() == close.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(close[name], tensor, rtol=1e-3, atol=1e-4)
    assert len(checkpoints.newest_first(sharded.parent)) == checkpoints.KEPT


def test_without_ray_a_training_goes_on_from_its_newest_checkpoint(tmp_path: Path, model: Path) -> None:
    here = RayConfig(local=True)
    (whole,) = train([training("whole", model)], tmp_path, here)
    mortal = training("mortal", model, dies_after=5, grave=str(tmp_path / "grave"), raises=True)
    with pytest.raises(RuntimeError, match="died at step 5"):
        train([mortal], tmp_path, here)
    (resumed,) = train([mortal], tmp_path, here)
    kept = sorted(path.name for path in resumed.parent.glob("step-*"))
    assert kept == [f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"]
    expected, same = (load_tensors(path / "state.safetensors") for path in (whole, resumed))
    assert all(torch.equal(expected[name], same[name]) for name in expected)


def test_an_error_in_building_arrives_as_itself_and_is_not_retried(
    tmp_path: Path, model: Path, ray_cluster: RayConfig
) -> None:
    with pytest.raises(FeedbackError, match=r"^only good labels$"):
        train([training("nothing", model, build="build_nothing")], tmp_path, ray_cluster)


def test_a_half_written_list_of_checkpoints_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / checkpoints.RAYS_LIST).write_text('{"checkpoint_results": [')
    checkpoints.heal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    checkpoints.heal(tmp_path)


def test_the_fewest_workers_are_not_above_the_most() -> None:
    with pytest.raises(ValueError, match=r"min_workers \(3\) must not be above num_workers \(2\)"):
        RayConfig(num_workers=2, min_workers=3)
