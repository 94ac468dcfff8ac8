"""What a generation replica answers a gateway that asks for a `SampleSpec` of a model's digest.

Light, so that gateways import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.models import Missing


@dataclass(frozen=True)
class Drawn:
    """uint8 pixels (HWC)."""

    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Steps:
    """Denoising steps done so far."""

    done: int


@dataclass(frozen=True)
class Busy:
    """The engine's queue is full, or the engine has ended: ask again, or another replica."""


@dataclass(frozen=True)
class Refused:
    """What the engine cannot draw, whoever asks; `message` is fit for clients."""

    message: str


Outcome = Drawn | Missing | Busy | Refused
