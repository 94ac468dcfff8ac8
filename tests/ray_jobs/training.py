"""A fine-tuning on random latents, which may kill its worker once."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import load_diffusion_model
from accord.diffusion.sharding import shard
from accord.errors import FeedbackError

STEPS = 6


class Mortal:
    """A learner whose process is killed after some steps, unless `grave` says that it has died before.

    `raises`: an exception instead.
    """

    def __init__(self, learner: Finetuner, dies_after: int, grave: Path, raises: bool) -> None:
        self.learner, self.dies_after, self.grave, self.raises = learner, dies_after, grave, raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def step(self) -> dict[str, Any]:
        if self.learner.step_index == self.dies_after and not self.grave.exists():
            self.grave.touch()
            if self.raises:
                raise RuntimeError(f"died at step {self.dies_after}")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.learner.step()


def build(
    *,
    rank: int,
    world_size: int,
    wrap: Any,
    device: Any,
    model: str,
    dies_after: int = -1,
    grave: str = "",
    raises: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A Build of ray_jobs.train; `changes` are those of FinetuneConfig."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    data = FinetuneData(
        latents_NCHW=random(12, 4, 8, 8),
        text_index_N=torch.arange(12) % 3,
        reward_N=torch.rand(12, generator=generator),
        pretraining_latents_MCHW=random(8, 4, 8, 8),
        pretraining_text_index_M=torch.arange(8) % 3,
        pretraining_reward_M=torch.rand(8, generator=generator),
        text_KTD=random(3, 24, 32),
        empty_text_TD=random(24, 32),
    )
    small = {"steps": STEPS, "batch_size": 4, "pretraining_batch_size": 4, "learning_rate": 1e-3}
    config = FinetuneConfig.model_validate(small | changes)
    base = load_diffusion_model(model, device=device)
    if wrap is not None and config.sharding == "fsdp":
        wrap = shard
    learner = Finetuner(base, data, config, seed, rank=rank, world_size=world_size, wrap=wrap)
    return Mortal(learner, dies_after, Path(grave), raises)


def build_nothing(**arguments: Any) -> Any:
    """A Build that finds nothing to learn from."""
    raise FeedbackError("only good labels")
