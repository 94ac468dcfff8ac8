"""The worker's side of the guards: averaged weights left for whoever measures them, and the word to stop.

A snapshot is a directory that appears whole: pending/step-00000100/unet.safetensors. The training never waits
for its measurement. When too many wait already, none is left.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.artifacts import save_tensors, write_file

MOST_PENDING = 3
"""Snapshots that may wait: each is as large as the UNet."""
WEIGHTS = "unet.safetensors"


@dataclass(frozen=True)
class Snapshots:
    """Where a training leaves its snapshots. `offset`: steps of the rounds before it."""

    directory: str
    every: int
    offset: int = 0

    def at(self, step: int) -> bool:
        """Whether one is due after this step of the training."""
        return step % self.every == 0

    def take(self, unet: Any, step: int) -> bool:
        """Leaves the weights of a UNet after `step` steps, unless they are there, or too many wait."""
        pending = Path(self.directory) / "pending"
        pending.mkdir(parents=True, exist_ok=True)
        name = f"step-{step + self.offset:08d}"
        waiting = {path.name for path in pending.glob("step-*")}
        if name in waiting or len(waiting) >= MOST_PENDING:
            return False
        temporary = pending / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_tensors(temporary / WEIGHTS, unet.state_dict())
        temporary.rename(pending / name)
        return True

    def must_stop(self) -> bool:
        """Whether the guards have asked the training to end."""
        return (Path(self.directory) / "stop").exists()


def pending(directory: Path) -> list[tuple[int, Path]]:
    """The snapshots that wait, by step."""
    found = sorted((directory / "pending").glob("step-*"))
    return [(int(path.name.removeprefix("step-")), path / WEIGHTS) for path in found]


def ask_to_stop(directory: Path, reason: str) -> None:
    """Makes `must_stop` true, for this training and those after it."""
    write_file(directory / "stop", reason + "\n")
