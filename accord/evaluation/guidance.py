"""Guidance as part of the comparison: success against Fréchet distance over guidance scales, for each model.

A fine-tuned model may only have learned what a higher guidance scale gives for nothing. So each model is
compared at its own best scale, chosen on prompts and seeds of their own, and whole frontiers are compared at
equal fidelity.

Shapes: P points of a frontier, S guidance scales of the baseline, K prompts, R resamples.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from accord.errors import AccordError
from accord.evaluation.fidelity import Reference, diversity
from accord.evaluation.plan import CHOICE
from accord.evaluation.statistics import (
    DIFFERENCE,
    Bootstrap,
    Floats,
    Interval,
    bootstrap_interval,
    cluster_codes,
)


@dataclass(frozen=True)
class FrontierPoint:
    """One model at one guidance scale, on the images of one group."""

    group: str
    model: str
    guidance: float
    success: Interval
    readable: Interval
    diversity: Interval
    frechet: float
    kid: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The plain form in summary.json."""
        return {
            "group": self.group,
            "model": self.model,
            "guidance": self.guidance,
            "success": self.success.as_dict(),
            "readable": self.readable.as_dict(),
            "diversity": self.diversity.as_dict(),
            "frechet": self.frechet,
            "kid": self.kid,
            "n": self.n,
        }


@dataclass(frozen=True)
class FrontierGain:
    """How much more often a model succeeds than the baseline, by two fair comparisons.

    A gain at equal guidance but none at equal Fréchet distance is distilled guidance: the baseline gets as
    much, at the same price in fidelity, by a higher scale.
    """

    at_equal_guidance: Interval
    at_equal_frechet: Interval

    @property
    def moved(self) -> bool | None:
        """The frontier itself is better: the interval at equal Fréchet distance is above 0.

        None without an interval.
        """
        return bool(self.at_equal_frechet.low > 0) if np.isfinite(self.at_equal_frechet.low) else None

    def as_dict(self) -> dict[str, Any]:
        """The plain form in summary.json."""
        return {
            "at_equal_guidance": self.at_equal_guidance.as_dict(),
            "at_equal_frechet": self.at_equal_frechet.as_dict(),
            "moved": self.moved,
        }


def frontier_table(
    measurements: pd.DataFrame,
    features_ND: NDArray[np.float32],
    reference: Reference,
    *,
    group: str = CHOICE,
    bootstrap: Bootstrap | None = None,
) -> list[FrontierPoint]:
    """One point for each model and guidance scale in `group`, ordered by model and scale.

    Args:
        measurements: one row an image; features_ND: aligned with its rows by position.
    """
    in_group_N = (measurements["group"] == group).to_numpy()
    model_N, guidance_N = (
        measurements["model"].to_numpy(dtype=str),
        measurements["guidance"].to_numpy(dtype=float),
    )
    prompt_N = measurements["prompt"].to_numpy(dtype=str)
    success_N, readable_N = (
        measurements["success"].to_numpy(dtype=float),
        measurements["readable"].to_numpy(dtype=float),
    )
    points = []
    for model, scale in sorted(set(zip(model_N[in_group_N], guidance_N[in_group_N], strict=True))):
        rows = np.flatnonzero(in_group_N & (model_N == model) & (guidance_N == scale))
        prompts = prompt_N[rows]
        points.append(
            FrontierPoint(
                group=group,
                model=str(model),
                guidance=float(scale),
                success=bootstrap_interval(success_N[rows], prompts, bootstrap=bootstrap),
                readable=bootstrap_interval(readable_N[rows], prompts, bootstrap=bootstrap),
                diversity=diversity(features_ND[rows], prompts, bootstrap=bootstrap),
                frechet=reference.frechet(features_ND[rows]),
                kid=reference.kid(features_ND[rows]),
                n=len(rows),
            )
        )
    return points


def choose_guidance(frontier: Iterable[FrontierPoint]) -> dict[str, float]:
    """Each model's scale of the highest success on the "choice" rows, the smaller scale in a tie.

    Points of any other group are not looked at, so that a claim is never made on the images that chose its
    scale.

    Raises AccordError if there is no point of the group "choice" with a success rate.
    """
    best: dict[str, FrontierPoint] = {}
    for point in sorted(frontier, key=lambda point: (point.model, point.guidance)):
        if point.group != CHOICE or not np.isfinite(point.success.value):
            continue
        if point.model not in best or point.success.value > best[point.model].success.value:
            best[point.model] = point
    if not best:
        raise AccordError(
            f"no guidance scale can be chosen: the frontier has no points of the group {CHOICE!r}"
        )
    return {model: point.guidance for model, point in best.items()}


def frontier_gain(
    measurements: pd.DataFrame,
    features_ND: NDArray[np.float32],
    reference: Reference,
    frontier: Sequence[FrontierPoint],
    model: str,
    *,
    baseline: str = "base",
    bootstrap: Bootstrap | None = None,
) -> FrontierGain:
    """Compares two models' frontiers on the group of `frontier`, by resampling the prompts that both have.

    At equal guidance: the mean over common scales of the difference in success. At equal Fréchet distance:
    the mean, over the model's points that none of its own dominates, of its success above that of the
    baseline at that distance. The baseline's curve is its best success at no more than that distance, linear
    between its points, and that of its nearest point beyond its ends. Success and distance are both
    resampled.
    """
    ours = [point for point in frontier if point.model == model]
    theirs = [point for point in frontier if point.model == baseline]
    groups = {point.group for point in ours + theirs}
    if len(groups) > 1:
        raise AccordError(
            f"frontiers of different groups cannot be compared: got {', '.join(sorted(groups))}"
        )
    prompts = [set(measurements.loc[measurements["model"] == name, "prompt"]) for name in (model, baseline)]
    kept_N = (
        measurements["group"].isin(groups) & measurements["prompt"].isin(prompts[0] & prompts[1])
    ).to_numpy()
    resampled = _Resampled(measurements[kept_N], features_ND[kept_N], reference, bootstrap or Bootstrap())

    shared = {point.guidance for point in ours} & {point.guidance for point in theirs}
    ours_shared, theirs_shared = ([p for p in points if p.guidance in shared] for points in (ours, theirs))
    equal_guidance = resampled.gain(ours_shared, resampled.success(theirs_shared))

    curve = [point for point in theirs if np.isfinite(point.frechet)]
    efficient = undominated([point for point in ours if np.isfinite(point.frechet)]) if curve else []
    reached_RP = best_within(resampled.frechet(efficient), resampled.frechet(curve), resampled.success(curve))
    return FrontierGain(equal_guidance, resampled.gain(efficient, reached_RP))


class _Resampled:
    """Points of frontiers in the data (row 0 of R) and in every resample of its prompts."""

    def __init__(
        self, rows: pd.DataFrame, features_ND: NDArray[np.float32], reference: Reference, bootstrap: Bootstrap
    ) -> None:
        self.bootstrap, self.reference, self.features_ND = bootstrap, reference, features_ND
        self.codes_N, self.clusters = cluster_codes(rows["prompt"].to_numpy(dtype=str))
        self.counts_RK = np.vstack([np.ones((1, self.clusters)), bootstrap.counts(self.clusters)])
        self.model_N = rows["model"].to_numpy(dtype=str)
        self.guidance_N, self.success_N = (
            rows[name].to_numpy(dtype=float) for name in ("guidance", "success")
        )

    def success(self, points: Sequence[FrontierPoint]) -> Floats:
        """success_RP; NaN where a resample has no image of the point."""
        return self._means(points, lambda here_N: self.success_N[here_N])

    def frechet(self, points: Sequence[FrontierPoint]) -> Floats:
        """frechet_RP, to first order around the points' own distances."""
        change_RP = self._means(
            points, lambda here_N: self.reference.frechet_influence(self.features_ND[here_N])
        )
        return np.maximum(0.0, np.array([point.frechet for point in points]) + change_RP)

    def gain(self, points: Sequence[FrontierPoint], baseline_RP: Floats) -> Interval:
        """The mean over the points of their success above the baseline's, with its interval."""
        gain_RP = self.success(points) - baseline_RP
        gain_R = gain_RP.mean(axis=1) if points else np.full(len(gain_RP), np.nan)
        n = sum(point.n for point in points)
        return self.bootstrap.interval(
            float(gain_R[0]), gain_R[1:], n=n, clusters=self.clusters, support=DIFFERENCE
        )

    def _means(
        self, points: Sequence[FrontierPoint], values: Callable[[NDArray[np.bool_]], Floats]
    ) -> Floats:
        mean_RP = np.full((len(self.counts_RK), len(points)), np.nan)
        for column, point in enumerate(points):
            here_N = (self.model_N == point.model) & (self.guidance_N == point.guidance)
            sums_K = np.bincount(self.codes_N[here_N], values(here_N), minlength=self.clusters)
            total_R = self.counts_RK @ np.bincount(self.codes_N[here_N], minlength=self.clusters)
            np.divide(self.counts_RK @ sums_K, total_R, out=mean_RP[:, column], where=total_R > 0)
        return mean_RP


def best_within(distance_RP: ArrayLike, curve_distance_RS: ArrayLike, curve_success_RS: ArrayLike) -> Floats:
    """success_RP: the most that a curve of S points reaches at no more than each distance.

    Linear between the points of the curve that are best so far, and flat beyond its ends; row by row.
    """
    targets_RP, distance_RS = np.asarray(distance_RP, dtype=float), np.asarray(curve_distance_RS, dtype=float)
    order_RS = np.argsort(distance_RS, axis=1, kind="stable")
    distance_RS = np.take_along_axis(distance_RS, order_RS, axis=1)
    success_RS = np.take_along_axis(np.asarray(curve_success_RS, dtype=float), order_RS, axis=1)
    best_RS = np.maximum.accumulate(success_RS, axis=1)
    if not targets_RP.size:
        return np.zeros(targets_RP.shape)
    return np.stack([np.interp(*row) for row in zip(targets_RP, distance_RS, best_RS, strict=True)])


def undominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points, by Fréchet distance, that no other beats in success at no greater distance."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.frechet, -point.success.value)):
        if not kept or point.success.value > kept[-1].success.value:
            kept.append(point)
    return kept
