"""How well a score ranks images as people do: on labelled images that it was not trained on.

The rows: prompt, category, split, label (1 good, 0 bad; NaN where raters did not agree), and one column a
score. Where simulated raters know it, there is also truth: the label without their mistakes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from accord.errors import AccordError
from accord.evaluation.statistics import (
    DIFFERENCE,
    PROPORTION,
    Bootstrap,
    Floats,
    Interval,
    auc,
    auc_within,
    cluster_codes,
    finite_rows,
    pairwise_accuracy,
)
from accord.prompts import Split
from accord.reward.calibration import expected_calibration_error, reliability_bins

REWARD_COLUMNS = ("prompt", "category", "split", "label")
SCORES: Mapping[str, bool] = {"reward": True, "reward_no_auxiliary": True, "clip": False}
"""Each score, and whether it claims to be a probability, so that its calibration can be measured."""


def score_quality(
    rows: pd.DataFrame, score: str, *, probability: bool, bins: int = 10, bootstrap: Bootstrap | None = None
) -> dict[str, Any]:
    """How `score` ranks the labelled rows, and how calibrated it is; NaN where undefined.

    auc, auc_within_category and pairwise_accuracy (on images of the same prompt) are estimates with
    intervals; auc_by_category, ece and reliability (mean prediction and share of good for each bin that holds
    a row) have none.
    """
    bootstrap = bootstrap or Bootstrap()
    rows = _usable(rows, [score])
    scores_N, labels_N = rows[score].to_numpy(dtype=float), rows["label"].to_numpy(dtype=float)
    prompts_N, categories_N = rows["prompt"].to_numpy(dtype=str), rows["category"].to_numpy(dtype=str)
    weights_RN, clusters = _resampled_rows(prompts_N, bootstrap)

    def interval(value: float, resampled_R: Floats) -> Interval:
        return bootstrap.interval(value, resampled_R, n=len(rows), clusters=clusters, support=PROPORTION)

    pooled = interval(auc(scores_N, labels_N), auc(scores_N, labels_N, weights_RN))
    within = interval(
        auc_within(scores_N, labels_N, categories_N), auc_within(scores_N, labels_N, categories_N, weights_RN)
    )
    pairs = pairwise_accuracy(scores_N, labels_N, prompts_N, bootstrap=bootstrap)
    return {
        "auc": pooled.as_dict(),
        "auc_within_category": within.as_dict(),
        "auc_by_category": {
            str(name): auc(scores_N[categories_N == name], labels_N[categories_N == name])
            for name in np.unique(categories_N)
        },
        "pairwise_accuracy": pairs.as_dict(),
        "ece": expected_calibration_error(scores_N, labels_N, bins) if probability else float("nan"),
        "reliability": _reliability(scores_N, labels_N, bins) if probability else [],
        "n": len(rows),
        "good": int((labels_N > 0.5).sum()),
    }


def auc_gain(rows: pd.DataFrame, score: str, over: str, *, bootstrap: Bootstrap | None = None) -> Interval:
    """The AUC within categories of `score` less that of `over`, on the same resampled prompts."""
    bootstrap = bootstrap or Bootstrap()
    rows = _usable(rows, [score, over])
    labels_N, categories_N = rows["label"].to_numpy(dtype=float), rows["category"].to_numpy(dtype=str)
    weights_RN, clusters = _resampled_rows(rows["prompt"].to_numpy(dtype=str), bootstrap)
    first, second = rows[score].to_numpy(dtype=float), rows[over].to_numpy(dtype=float)
    value = auc_within(first, labels_N, categories_N) - auc_within(second, labels_N, categories_N)
    resampled_R = auc_within(first, labels_N, categories_N, weights_RN) - auc_within(
        second, labels_N, categories_N, weights_RN
    )
    return bootstrap.interval(value, resampled_R, n=len(rows), clusters=clusters, support=DIFFERENCE)


def reward_quality(
    rows: pd.DataFrame | None, *, bins: int = 10, bootstrap: Bootstrap | None = None
) -> dict[str, dict[str, Any]]:
    """The summary's `reward`, `reward_no_auxiliary`, `clip` and `reward_gain`, each by split.

    reward_gain.{clip,reward_no_auxiliary}.SPLIT is the gain of the reward in AUC within categories over that
    score.
    """
    if rows is None:
        rows = pd.DataFrame({name: [] for name in (*REWARD_COLUMNS, *SCORES)})
    missing = [name for name in (*REWARD_COLUMNS, *SCORES) if name not in rows.columns]
    if missing:
        raise AccordError(
            f"the labelled rows lack the columns {', '.join(missing)}; they have {', '.join(rows.columns)}"
        )
    by_split = {str(split): rows[rows["split"] == str(split)] for split in Split}
    quality: dict[str, dict[str, Any]] = {
        score: {
            split: score_quality(part, score, probability=probability, bins=bins, bootstrap=bootstrap)
            for split, part in by_split.items()
        }
        for score, probability in SCORES.items()
    }
    quality["reward_gain"] = {
        over: {
            split: auc_gain(part, "reward", over, bootstrap=bootstrap).as_dict()
            for split, part in by_split.items()
        }
        for over in ("clip", "reward_no_auxiliary")
    }
    return quality


def label_quality(rows: pd.DataFrame | None, *, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """What raters' mistakes do to the labels and to what is measured by them; empty where no truth is known.

    `right` is the share of labels that are true, and `reward` the reward's AUC (an estimate) by "label" and
    by "truth", on the same rows.
    """
    if rows is None or "truth" not in rows.columns:
        return {}
    rows = rows[finite_rows(rows["label"], rows["truth"], rows["reward"])]
    if rows.empty:
        return {}
    bootstrap = bootstrap or Bootstrap()
    weights_RN, clusters = _resampled_rows(rows["prompt"].to_numpy(dtype=str), bootstrap)

    def share(value: float, resampled_R: Floats) -> dict[str, Any]:
        return bootstrap.interval(
            value, resampled_R, n=len(rows), clusters=clusters, support=PROPORTION
        ).as_dict()

    scores_N = rows["reward"].to_numpy(dtype=float)
    label_N, truth_N = (rows[name].to_numpy(dtype=float) for name in ("label", "truth"))
    right_N = (label_N == truth_N).astype(float)
    right_R = weights_RN @ right_N / weights_RN.sum(axis=1)
    return {
        "right": share(float(right_N.mean()), right_R),
        "reward": {
            name: share(auc(scores_N, by_N), auc(scores_N, by_N, weights_RN))
            for name, by_N in (("label", label_N), ("truth", truth_N))
        },
    }


def _usable(rows: pd.DataFrame, scores: list[str]) -> pd.DataFrame:
    return rows[finite_rows(rows["label"], *(rows[score] for score in scores))]


def _resampled_rows(prompts_N: np.ndarray[Any, Any], bootstrap: Bootstrap) -> tuple[Floats, int]:
    """weights_RN, how often each row is in each resample of prompts, and how many prompts there are."""
    codes_N, clusters = cluster_codes(prompts_N)
    return bootstrap.counts(clusters)[:, codes_N], clusters


def _reliability(scores_N: Floats, labels_N: Floats, bins: int) -> list[dict[str, float]]:
    return [
        {"low": b.low, "high": b.high, "predicted": b.mean_score, "observed": b.good_share, "n": b.count}
        for b in reliability_bins(scores_N, labels_N, bins)
    ]
