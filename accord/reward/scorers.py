"""What rates images besides the reward that was learned here: a plug for scorers, and their weighted mean.

A scorer is any object with `score`; a recipe names a function that makes one, as "package.module:function",
with its options:

    rewards:
      - {scorer: reward, weight: 0.7}
      - {scorer: "my_package.aesthetics:scorer", options: {device: cpu}, weight: 0.3, normalise: logistic}

Shapes: B images, T rewards that are combined, H W pixels, C = 3 channels RGB.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accord.config import Config, load_object
from accord.errors import ConfigError
from accord.images import Pixels
from accord.reward.settings import Normalise, RewardTerm

Floats = NDArray[np.float64]

_QUANTILES = 257


@runtime_checkable
class Scorer(Protocol):
    """Rates images for prompts. RewardModel is one, as are TextNormalised and RemoteScorer.

    It may have a text `identity`, such as the digest of its weights: it is kept with what it scored. It may
    have a `close()` too, which is called when it has scored.
    """

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        """score_B of each uint8 RGB image (HWC, any sizes) for its own prompt: finite, higher is better, the
        same whatever the batch."""


def open_scorer(spec: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer that the function `spec` ("module:function") makes with these keyword arguments.

    Raises:
        ConfigError: there is no such function, it does not know an option, or what it makes has no `score`;
            and whatever the function raises.
    """
    options = options or {}
    factory = load_object(spec)
    try:
        inspect.signature(factory).bind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{spec!r} cannot be called with the options {', '.join(options) or '(none)'}: {error}"
        ) from None
    scorer = factory(**options)
    if not isinstance(scorer, Scorer):
        raise ConfigError(
            f"{spec!r} made a {type(scorer).__name__}, which cannot score; expected an object with the "
            "method score(images, prompts) -> Tensor"
        )
    return scorer


def scores_of(scorer: Scorer, title: str, images: Sequence[Pixels], prompts: Sequence[str]) -> Floats:
    """The scorer's score_B, checked.

    Raises:
        ConfigError: it gave another number of scores than images, or one that is not finite.
    """
    found = scorer.score(images, prompts)
    if not isinstance(found, Tensor) or found.shape != (len(images),):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the scorer {title!r} gave {shape} for {len(images)} images; expected a tensor of one each"
        )
    score_B = found.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(score_B).all():
        raise ConfigError(
            f"the scorer {title!r} gave {int((~np.isfinite(score_B)).sum())} scores of {len(score_B)} that "
            "are not finite; expected numbers"
        )
    return np.asarray(score_B, dtype=np.float64)


class Normaliser(Config):
    """How one scorer's scores become numbers in [0, 1]; measured once, so that the same image has the same
    reward whatever it is scored with later."""

    kind: Normalise
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = ()
    """Of the scores that it was measured on, evenly spaced from the least to the greatest."""

    @classmethod
    def measured(cls, kind: Normalise, score_B: Floats) -> Normaliser:
        """From the scores of the images that the others are compared with."""
        if kind == "logistic":
            return cls(kind=kind, mean=float(score_B.mean()), std=float(score_B.std()))
        if kind == "rank":
            grid = np.quantile(score_B, np.linspace(0, 1, _QUANTILES))
            return cls(kind=kind, quantiles=tuple(map(float, grid)))
        return cls(kind=kind)

    def __call__(self, score_B: Floats, title: str = "scorer") -> Floats:
        """Numbers in [0, 1]. ConfigError for scores outside of it that nothing was to be done about."""
        if self.kind == "logistic":
            deviations_B = (score_B - self.mean) / (self.std or 1.0)
            return np.asarray(np.exp(-np.logaddexp(0.0, -deviations_B)), dtype=np.float64)
        if self.kind == "rank":
            below = np.searchsorted(self.quantiles, score_B, side="left")
            upto = np.searchsorted(self.quantiles, score_B, side="right")
            return np.asarray((below + upto) / (2 * len(self.quantiles)), dtype=np.float64)
        if len(score_B) and not (score_B.min() >= 0 and score_B.max() <= 1):
            raise ConfigError(
                f"the scorer {title!r} gave scores from {score_B.min():.4g} to {score_B.max():.4g}; expected "
                "rewards in [0, 1]: give it normalise: logistic, or rank"
            )
        return score_B


def combine(
    terms: Sequence[RewardTerm], scores: Mapping[str, Floats], normalisers: Mapping[str, Normaliser]
) -> Floats:
    """reward_B in [0, 1]: the mean of the normalised scores (by the terms' titles), weighted as stated."""
    weight_T = np.array([term.weight for term in terms])
    value_TB = np.stack([normalisers[term.title](scores[term.title], term.title) for term in terms])
    return np.asarray((weight_T / weight_T.sum()) @ value_TB, dtype=np.float64)
