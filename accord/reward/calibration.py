"""How far a reward can be read as the probability that people call an image good. Pure numpy.

Shapes: B judged images, C parameters of a scaling, K bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.errors import FeedbackError
from accord.reward.settings import CalibrationMethod

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


def fit_platt(score_B: ArrayLike, label_B: ArrayLike) -> Platt:
    """The Platt scaling that makes the labels likeliest (Platt 1999), by Newton's method.

    Labels above 0.5 are good. As in Platt's paper the targets are (good + 1) / (good + 2) and 1 / (bad + 2)
    instead of 1 and 0, which keeps the slope finite when the scores separate the labels. A slope is never
    negative: a scaling may not reverse a ranking.

    Raises:
        FeedbackError: when the labels are all good or all bad.
    """
    target_B, logit_B = _targets(label_B), _logit(score_B)
    slope, intercept = _likeliest(np.stack([logit_B, np.ones_like(logit_B)], axis=1), target_B)
    if slope < 0:
        share = float(target_B.mean())
        return Platt(slope=0.0, intercept=float(np.log(share / (1 - share))))
    return Platt(float(slope), float(intercept))


def fit_temperature(score_B: ArrayLike, label_B: ArrayLike) -> Platt:
    """Temperature scaling (Guo et al. 2017): sigmoid(logit(score) / T), a slope of 1 / T without intercept.

    One number can be fitted on few images, and it leaves a score of 1/2 where it is. Targets and errors are
    those of `fit_platt`.
    """
    (slope,) = _likeliest(_logit(score_B)[:, None], _targets(label_B))
    return Platt(slope=max(float(slope), 0.0))


FITS: dict[CalibrationMethod, Callable[[ArrayLike, ArrayLike], Platt]] = {
    "platt": fit_platt,
    "temperature": fit_temperature,
}


def _targets(label_B: ArrayLike) -> Floats:
    good_B = np.asarray(label_B, dtype=np.float64) > 0.5
    num_good, num_bad = int(good_B.sum()), int((~good_B).sum())
    if num_good == 0 or num_bad == 0:
        raise FeedbackError(
            f"cannot calibrate on {num_good} good and {num_bad} bad images: both kinds are needed; "
            "judge more images"
        )
    targets: Floats = np.where(good_B, (num_good + 1) / (num_good + 2), 1 / (num_bad + 2)).astype(np.float64)
    return targets


def _likeliest(inputs_BC: Floats, target_B: Floats, iterations: int = 100) -> Floats:
    """parameters_C of the logistic regression on these inputs, from 1, 0, ..., 0."""
    parameters_C = np.zeros(inputs_BC.shape[1])
    parameters_C[0] = 1.0
    for _ in range(iterations):
        probability_B = _sigmoid(inputs_BC @ parameters_C)
        gradient_C = inputs_BC.T @ (probability_B - target_B)
        curvature_B = np.maximum(probability_B * (1 - probability_B), 1e-12)
        hessian_CC = (inputs_BC * curvature_B[:, None]).T @ inputs_BC + 1e-9 * np.eye(len(parameters_C))
        newton_C = np.linalg.solve(hessian_CC, gradient_C).astype(np.float64)
        step_C = _damped(inputs_BC, target_B, parameters_C, newton_C)
        parameters_C = parameters_C - step_C
        if np.abs(step_C).max() < 1e-10:
            break
    return parameters_C


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


def calibration_report(
    score_B: ArrayLike, label_B: ArrayLike, method: CalibrationMethod, bins: int = 10
) -> dict[str, Any]:
    """The scaling that is fitted on these images and what it does to their scores, as plain values.

    method, slope, intercept, images; ece and reliability of the scores as they are, and ece_calibrated and
    reliability_calibrated of each half of the images scaled by what was fitted on the other half: on the
    images that it was fitted on, a scaling looks better than it is. These are None where a half has labels of
    one kind only.

    Raises:
        FeedbackError: when the labels are all good or all bad.
    """
    scores_B, labels_B = np.asarray(score_B, dtype=np.float64), np.asarray(label_B, dtype=np.float64)
    scaling = FITS[method](scores_B, labels_B)
    report: dict[str, Any] = {
        "method": method,
        "slope": scaling.slope,
        "intercept": scaling.intercept,
        "images": len(scores_B),
        "ece": expected_calibration_error(scores_B, labels_B, bins),
        "reliability": [asdict(bin_) for bin_ in reliability_bins(scores_B, labels_B, bins)],
        "ece_calibrated": None,
        "reliability_calibrated": None,
    }
    scaled_B = _cross_fitted(scores_B, labels_B, method)
    if scaled_B is not None:
        report["ece_calibrated"] = expected_calibration_error(scaled_B, labels_B, bins)
        report["reliability_calibrated"] = [asdict(b) for b in reliability_bins(scaled_B, labels_B, bins)]
    return report


def _cross_fitted(score_B: Floats, label_B: Floats, method: CalibrationMethod) -> Floats | None:
    """Each half's scores (every other good and every other bad image) scaled by the fit of the other half."""
    good_B = label_B > 0.5
    if min(good_B.sum(), (~good_B).sum()) < 2:
        return None
    place_B = np.where(good_B, np.cumsum(good_B), np.cumsum(~good_B))
    scaled_B = np.empty_like(score_B)
    for half in (0, 1):
        mine_B = place_B % 2 == half
        scaled_B[mine_B] = FITS[method](score_B[~mine_B], label_B[~mine_B])(score_B[mine_B])
    return scaled_B


def _damped(inputs_BC: Floats, target_B: Floats, parameters_C: Floats, step_C: Floats) -> Floats:
    """Newton's step, halved until it does not raise the loss: far from the optimum it can overshoot."""
    before = _cross_entropy(inputs_BC @ parameters_C, target_B)
    for _ in range(30):
        if _cross_entropy(inputs_BC @ (parameters_C - step_C), target_B) <= before:
            return step_C
        step_C = step_C / 2
    return np.zeros_like(step_C)


def _cross_entropy(logit_B: Floats, target_B: Floats) -> float:
    return float((np.logaddexp(0.0, logit_B) - target_B * logit_B).sum())


def _logit(score: ArrayLike) -> Floats:
    clipped = np.clip(np.asarray(score, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)


def _sigmoid(value: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0.0, -value)), dtype=np.float64)
