"""What is measured of images, each a pure function of arrays.

Shapes: B images, H W pixels, C = 3 channels RGB (uint8), D features or latent numbers, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.config import load_object
from accord.errors import ConfigError
from accord.evaluation.fidelity import diversity_by_prompt
from accord.images import Pixels

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

Floats = NDArray[np.float64]
Judge = Callable[[Pixels, Sequence[str]], ArrayLike]
"""(images_BHWC, prompts) -> one number an image: a reward, or another measure."""


def make_judge(spec: str) -> Judge:
    """What the factory "package.module:factory" makes: a callable, or an object whose `score` is one.

    Raises ConfigError when it makes neither.
    """
    made = load_object(spec)()
    judge = getattr(made, "score", made)
    if not callable(judge):
        raise ConfigError(
            f"guards: {spec!r} made a {type(made).__name__}; expected a callable (images, prompts) -> "
            "numbers, or an object with such a method `score`"
        )
    return cast(Judge, judge)


EDGE = 0.08
"""Least step of luminance, of 1, between two neighbouring pixels that counts as an edge."""
_LUMA = np.array([0.299, 0.587, 0.114])


def saturation(images_BHWC: Pixels) -> Floats:
    """Mean saturation of each image's pixels, 0 (grey) to 1: (max - min) / max of red, green and blue."""
    pixels = np.asarray(images_BHWC, dtype=np.float64)
    most = pixels.max(axis=3)
    share: Floats = (most - pixels.min(axis=3)) / np.maximum(most, 1.0)
    return np.asarray(share.mean(axis=(1, 2)))


def edge_density(images_BHWC: Pixels) -> Floats:
    """Share of each image's pixels on an edge: falls as content goes, rises as grids and noise come."""
    luma_BHW = np.asarray(images_BHWC, dtype=np.float64) / 255 @ _LUMA
    across = np.abs(np.diff(luma_BHW, axis=2))[:, :-1, :]
    down = np.abs(np.diff(luma_BHW, axis=1))[:, :, :-1]
    return np.asarray((np.maximum(across, down) > EDGE).mean(axis=(1, 2)))


def diversity(features_BD: ArrayLike, prompt_B: ArrayLike) -> Floats:
    """Of each image's prompt, the mean distance between two of its images; NaN for a lone image."""
    distance_P, prompt_P = diversity_by_prompt(features_BD, prompt_B)
    distances = dict(zip(prompt_P.tolist(), distance_P.tolist(), strict=True))
    return np.array([distances.get(str(prompt), np.nan) for prompt in np.asarray(prompt_B)])


def prediction_distance(prediction_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """|f - f_ref|^2 / |f_ref|^2 of what two networks predict of the same noisy latents: distance_B.

    Up to a weight of the noise level this is the divergence of the two models, step by step.
    """
    gap_B = (prediction_BCHW.float() - reference_BCHW.float()).square().flatten(1).sum(dim=1)
    return gap_B / reference_BCHW.float().square().flatten(1).sum(dim=1).clamp_min(1e-12)


def by_prompt(values_B: Any, images_per_prompt: int) -> Floats:
    """Means over each prompt's images, which follow one another; NaN values are left out."""
    if hasattr(values_B, "detach"):  # a tensor, on whatever device
        values_B = values_B.detach().cpu().double().numpy()
    values = np.asarray(values_B, dtype=np.float64).reshape(-1, images_per_prompt)
    there = np.isfinite(values)
    totals = np.where(there, values, 0.0).sum(axis=1)
    counts = there.sum(axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
