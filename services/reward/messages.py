"""What a gateway asks of a reward replica, and what it gets: light, so that gateways import no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ScoreRequest:
    """Images (HWC, any sizes) with the prompt of each, to be scored by the model of this digest."""

    digest: str
    images: Sequence[Pixels]
    prompts: Sequence[str]
    probability: bool = False


@dataclass(frozen=True)
class Scores:
    """One number a pair; a probability is None when the prompt has no perturbations."""

    rewards: list[float]
    similarities: list[float]
    probabilities: list[float | None]
