"""What every training of ours shares: learning rate, random streams, and whose a checkpoint is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accord.errors import ConfigError


def scheduled_rate(
    learning_rate: float, schedule: str, step: int, steps: int, *, warmup_steps: int = 0
) -> float:
    """Linear warm-up, then "constant", or a "cosine" from learning_rate to 0 at `steps`."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return learning_rate
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def generator_for(seed: int, *stream: int | str) -> torch.Generator:
    """A random stream of its own for each seed, purpose and number (of a step, of a sample).

    So a step's draws depend neither on the steps before it nor on how many workers share it, and resuming
    needs no state of a generator.
    """
    words = [word for part in stream for word in (part.encode() if isinstance(part, str) else (part,))]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def refuse_another_run(stored: Mapping[str, Any], wanted: Mapping[str, Any], directory: str | Path) -> None:
    """Raises ConfigError, naming what differs, when a checkpoint's settings are not those of this run."""
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        changes = ", ".join(f"{key} ({stored.get(key)} -> {wanted.get(key)})" for key in differing)
        raise ConfigError(
            f"{directory}: this checkpoint was made with other settings: {changes}. Going on would mix two "
            "runs: set them back, or start a new run in another directory."
        )
