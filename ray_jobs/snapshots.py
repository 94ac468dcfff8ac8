"""The worker's side of the guards: averaged weights left for whoever measures them, and the word to stop.

A snapshot is a directory that appears whole: pending/step-00000100, with the trained tensors (of adapters
these alone) and what they belong to. The training never waits for its measurement. When too many wait
already, none is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord.artifacts import load_tensors, save_tensors, write_file
from accord.errors import ArtifactError

MOST_PENDING = 3
"""Snapshots that may wait: each may be as large as the UNet."""
WEIGHTS, ORIGIN = "trained.safetensors", "origin.json"


@dataclass(frozen=True)
class Snapshots:
    """Where a training leaves its snapshots, of a model in a directory with a FinetuneConfig as plain values.
    `offset`: steps of the rounds before it."""

    directory: str
    every: int
    offset: int = 0
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def at(self, step: int) -> bool:
        """Whether one is due after this step of the training."""
        return step % self.every == 0

    def take(self, learner: Any, step: int, *, last: bool = False) -> bool:
        """Leaves a learner's weights after `step` steps, unless they are there, or too many wait (the `last`
        of a training are always left). All workers call it; the first writes."""
        tensors = learner.trained()
        if tensors is None:
            return False
        pending = Path(self.directory) / "pending"
        pending.mkdir(parents=True, exist_ok=True)
        name = f"step-{step + self.offset:08d}"
        waiting = {path.name for path in pending.glob("step-*")}
        if name in waiting or (len(waiting) >= MOST_PENDING and not last):
            return False
        temporary = pending / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_tensors(temporary / WEIGHTS, tensors)
        (temporary / ORIGIN).write_text(json.dumps({"model": self.model, "config": dict(self.config)}))
        temporary.rename(pending / name)
        return True

    def must_stop(self) -> bool:
        """Whether the guards have asked the training to end."""
        return (Path(self.directory) / "stop").exists()

    def must_all_stop(self, rank: int) -> bool:
        """The same, as the first worker sees it, so that all end at the same step. All workers call it."""
        import torch
        import torch.distributed as dist

        stopped = rank == 0 and self.must_stop()
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return stopped
        word = torch.tensor([int(stopped)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(word, src=0)
        return bool(word.item())  # device-to-host sync, with those of the log


def unet_of(snapshot: Path) -> Any:
    """The whole UNet of a snapshot, in float32 on the CPU, frozen; adapters merged.

    Raises ArtifactError for a damaged snapshot, or one of another network.
    """
    from accord.diffusion.model import load_diffusion_model
    from accord.diffusion.settings import FinetuneConfig
    from accord.diffusion.trainable import put_weights

    origin = json.loads((snapshot / ORIGIN).read_text())
    unet = load_diffusion_model(origin["model"]).unet.float()
    try:
        put_weights(unet, load_tensors(snapshot / WEIGHTS), FinetuneConfig(**origin["config"]))
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{snapshot} does not fit the UNet of {origin['model']}: {error}") from error
    return unet


def pending(directory: Path) -> list[tuple[int, Path]]:
    """The snapshots that wait, by step."""
    found = sorted((directory / "pending").glob("step-*"))
    return [(int(path.name.removeprefix("step-")), path) for path in found]


def ask_to_stop(directory: Path, reason: str) -> None:
    """Makes `must_stop` true, for this training and those after it."""
    write_file(directory / "stop", reason + "\n")
