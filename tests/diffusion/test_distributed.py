"""Two workers, under DDP and under FSDP2, train what one does; each goes on from the other's checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from accord.artifacts import load_tensors, save_tensors
from accord.diffusion.checkpoint import STATE
from accord.diffusion.finetune import Finetuner
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.sharding import shard
from accord.errors import ConfigError
from tests.diffusion.tuning import config, make_data

pytestmark = pytest.mark.slow

# 4 + 4 images: the two workers' shares are alike, as sharding asks for; in two parts each.
COMMON = {"batch_size": 4, "pretraining_batch_size": 4, "gradient_accumulation": 2}
LORA = {"parameters": "lora", "lora": {"rank": 4}}
SIGNED = {"objective": "advantage_weighted_matching"}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-lora": {**LORA, **SIGNED},
    "fsdp": {"sharding": "fsdp", **SIGNED},
    # Some parts have no generated image, whose reference is the sharded network itself.
    "fsdp-lora": {"sharding": "fsdp", **LORA, **SIGNED, "gradient_accumulation": 4},
    "fsdp-bfloat16": {"sharding": "fsdp", "precision": "bfloat16", "gradient_checkpointing": True},
}
STEPS = 2


def settings(way: str) -> Any:
    return config(**{**COMMON, **WAYS[way]})


def work(rank: int, directory: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    model = load_diffusion_model(directory)
    for way in WAYS:
        make = partial(Finetuner, model, make_data(model), settings(way), seed=5, rank=rank, world_size=2)
        wrap = shard if way.startswith("fsdp") else DistributedDataParallel
        tuner = make(wrap=wrap)
        losses = []
        for step in range(STEPS):
            losses.append(tuner.step()["loss"])
            taken = tuner.snapshot()
            assert (taken is None) == (rank == 1)
            if taken is not None:
                taken.write(out / way / f"step-{step + 1}")
        resumed = make(wrap=wrap)
        resumed.load(out / "alone" / way / "step-1")
        loss = resumed.step()["loss"]
        if rank == 0:
            save_tensors(out / f"{way}.safetensors", {"losses": torch.stack([*losses, loss])})
    with pytest.raises(ConfigError, match=r"share evenly: batch_size \+ .* is 4 \+ 3"):
        Finetuner(
            model,
            make_data(model),
            config(batch_size=4, pretraining_batch_size=3, sharding="fsdp"),
            seed=5,
            rank=rank,
            world_size=2,
            wrap=shard,
        )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def out(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers, and before them one, made of each way."""
    out = tmp_path_factory.mktemp("distributed")
    model = load_diffusion_model(tiny_directory)
    for way in WAYS:
        alone = Finetuner(model, make_data(model), settings(way), seed=5)
        losses = []
        for step in range(STEPS):
            losses.append(alone.step()["loss"])
            alone.save(out / "alone" / way / f"step-{step + 1}")
        save_tensors(out / "alone" / f"{way}.safetensors", {"losses": torch.stack(losses)})
    torch.multiprocessing.spawn(work, (tiny_directory, out), nprocs=2)
    return out


def assert_alike(one: Path, two: Path, way: str) -> None:
    expected, found = load_tensors(one / STATE), load_tensors(two / STATE)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # Adam's first steps are sign(gradient) * rate, so where a gradient is nearly 0 its rounding shows.
        atol = 2e-4 if way != "fsdp-bfloat16" else 4e-3
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=atol, msg=(name + ": {}").format)


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_are_one(out: Path, way: str) -> None:
    expected = load_tensors(out / "alone" / f"{way}.safetensors")["losses"]
    found = load_tensors(out / f"{way}.safetensors")["losses"]
    close = {"rtol": 1e-4, "atol": 1e-5} if way != "fsdp-bfloat16" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found[:STEPS], expected, **close)
    assert_alike(out / "alone" / way / "step-1", out / way / "step-1", way)
    # Two workers that go on from one's checkpoint.
    torch.testing.assert_close(found[STEPS], expected[1], **close)


@pytest.mark.parametrize("way", WAYS)
def test_one_goes_on_from_the_checkpoint_of_two(out: Path, tiny_directory: Path, way: str) -> None:
    model = load_diffusion_model(tiny_directory)
    alone = Finetuner(model, make_data(model), settings(way), seed=5)
    alone.load(out / way / "step-1")
    loss = alone.step()["loss"]
    expected = load_tensors(out / f"{way}.safetensors")["losses"][1]
    close = {"rtol": 1e-4, "atol": 1e-5} if way != "fsdp-bfloat16" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(loss, expected, **close)
