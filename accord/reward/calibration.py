"""How far a reward can be read as the probability that people call an image good. Pure numpy.

Shapes: B judged images, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.errors import FeedbackError

Floats = NDArray[np.float64]

_EDGE = 1e-6
"""Scores are kept this far from 0 and 1, where the logit is infinite."""


@dataclass(frozen=True)
class Platt:
    """p = sigmoid(slope * logit(score) + intercept); slope 1 and intercept 0 change nothing."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, score: ArrayLike) -> Floats:
        """Probabilities for scores in [0, 1], of the same shape."""
        return _sigmoid(self.slope * _logit(score) + self.intercept)


def fit_platt(score_B: ArrayLike, label_B: ArrayLike, *, iterations: int = 100) -> Platt:
    """The Platt scaling that makes the labels likeliest (Platt 1999), by Newton's method.

    Labels above 0.5 are good. As in Platt's paper the targets are (good + 1) / (good + 2) and 1 / (bad + 2)
    instead of 1 and 0, which keeps the slope finite when the scores separate the labels. A slope is never
    negative: a scaling may not reverse a ranking.

    Raises:
        FeedbackError: when the labels are all good or all bad.
    """
    logit_B = _logit(score_B)
    good_B = np.asarray(label_B, dtype=np.float64) > 0.5
    num_good, num_bad = int(good_B.sum()), int((~good_B).sum())
    if num_good == 0 or num_bad == 0:
        raise FeedbackError(
            f"cannot calibrate on {num_good} good and {num_bad} bad images: both kinds are needed; "
            "judge more images"
        )
    target_B: Floats = np.where(good_B, (num_good + 1) / (num_good + 2), 1 / (num_bad + 2)).astype(np.float64)
    inputs_B2 = np.stack([logit_B, np.ones_like(logit_B)], axis=1)
    parameters_2 = np.array([1.0, 0.0])
    for _ in range(iterations):
        probability_B = _sigmoid(inputs_B2 @ parameters_2)
        gradient_2 = inputs_B2.T @ (probability_B - target_B)
        curvature_B = np.maximum(probability_B * (1 - probability_B), 1e-12)
        hessian_22 = (inputs_B2 * curvature_B[:, None]).T @ inputs_B2 + 1e-9 * np.eye(2)
        newton_2 = np.linalg.solve(hessian_22, gradient_2).astype(np.float64)
        step_2 = _damped(inputs_B2, target_B, parameters_2, newton_2)
        parameters_2 = parameters_2 - step_2
        if np.abs(step_2).max() < 1e-10:
            break
    if parameters_2[0] < 0:
        share = float(target_B.mean())
        return Platt(slope=0.0, intercept=float(np.log(share / (1 - share))))
    return Platt(slope=float(parameters_2[0]), intercept=float(parameters_2[1]))


@dataclass(frozen=True)
class Bin:
    """The images whose score lies in [low, high): their mean score, and the share of them that is good."""

    low: float
    high: float
    count: int
    mean_score: float
    good_share: float


def reliability_bins(score_B: ArrayLike, label_B: ArrayLike, bins: int = 10) -> list[Bin]:
    """Equal-width bins over [0, 1] that hold at least one image, lowest first; a score of 1 is in the
    last."""
    scores_B = np.asarray(score_B, dtype=np.float64)
    labels_B = np.asarray(label_B, dtype=np.float64)
    index_B = np.clip((scores_B * bins).astype(np.int64), 0, bins - 1)
    found = []
    for k in range(bins):
        inside_B = index_B == k
        if inside_B.any():
            score, share = float(scores_B[inside_B].mean()), float(labels_B[inside_B].mean())
            found.append(Bin(k / bins, (k + 1) / bins, int(inside_B.sum()), score, share))
    return found


def expected_calibration_error(score_B: ArrayLike, label_B: ArrayLike, bins: int = 10) -> float:
    """ECE (Guo et al. 2017): the mean over images of their bin's |mean score - good share|; NaN for no
    image."""
    found = reliability_bins(score_B, label_B, bins)
    if not found:
        return float("nan")
    gaps = [bin_.count * abs(bin_.mean_score - bin_.good_share) for bin_ in found]
    return sum(gaps) / sum(bin_.count for bin_ in found)


def _damped(inputs_B2: Floats, target_B: Floats, parameters_2: Floats, step_2: Floats) -> Floats:
    """Newton's step, halved until it does not raise the loss: far from the optimum it can overshoot."""
    before = _cross_entropy(inputs_B2 @ parameters_2, target_B)
    for _ in range(30):
        if _cross_entropy(inputs_B2 @ (parameters_2 - step_2), target_B) <= before:
            return step_2
        step_2 = step_2 / 2
    return np.zeros_like(step_2)


def _cross_entropy(logit_B: Floats, target_B: Floats) -> float:
    return float((np.logaddexp(0.0, logit_B) - target_B * logit_B).sum())


def _logit(score: ArrayLike) -> Floats:
    clipped = np.clip(np.asarray(score, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)


def _sigmoid(value: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0.0, -value)), dtype=np.float64)
