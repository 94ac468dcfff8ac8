"""Intervals and ranking quality, by arrays alone.

Images of one prompt are not independent, so every interval resamples prompts (a cluster bootstrap), never
single images. Resamples are drawn as counts of clusters, so a statistic that is a ratio of sums is one matrix
product.

Shapes: N rows, K clusters (prompts), R resamples, G groups of equal scores. Missing values are NaN, and a
statistic of nothing is NaN with n = 0: never zero, never an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

PROPORTION = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)

_CHUNK = 128  # resamples at a time where an array of resamples x rows is needed: bounds the memory


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made. The same settings and data give the same interval."""

    seed: int = 0
    resamples: int = 1000
    level: float = 0.95

    def counts(self, clusters: int) -> Floats:
        """counts_RK: how often each of K clusters is in each resample; rows sum to K."""
        return _counts(self.seed, self.resamples, clusters)

    def interval(
        self,
        value: float,
        resampled_R: ArrayLike,
        *,
        n: int,
        clusters: int,
        support: tuple[float, float] | None = None,
    ) -> "Interval":
        """The percentile interval of `value` from its resampled values, of which NaN are left out.

        When every resample gives the same value the bootstrap is blind: 0 of 12 would be [0, 0].
        Then, if the least and greatest possible values are given as `support`, the interval is the exact
        binomial one for "an outcome that none of the `clusters` showed": it has at most the probability 1 -
        (alpha / 2) ** (1 / clusters).
        """
        resampled = np.asarray(resampled_R, dtype=float)
        resampled = resampled[np.isfinite(resampled)]
        if n == 0 or not np.isfinite(value) or clusters == 0:
            return Interval(float("nan"), float("nan"), float("nan"), 0)
        tail = (1.0 - self.level) / 2.0
        if resampled.size == 0 or np.ptp(resampled) < 1e-12:
            if support is None:
                return Interval(value, float("nan"), float("nan"), n)
            unseen = 1.0 - tail ** (1.0 / clusters)
            low, high = value - (value - support[0]) * unseen, value + (support[1] - value) * unseen
            return Interval(value, low, high, n)
        low, high = np.quantile(resampled, [tail, 1.0 - tail])
        return Interval(value, float(low), float(high), n)


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` observations with its interval.

    All NaN where there is nothing to estimate from.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The plain form in summary.json."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def cluster_codes(clusters: ArrayLike) -> tuple[Codes, int]:
    """codes_N in [0, K), and K.

    Codes follow the sorted names, so they do not depend on the order of the rows.
    """
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return codes.reshape(-1).astype(np.intp), len(names)


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    bootstrap: Bootstrap | None = None,
    support: tuple[float, float] | None = PROPORTION,
) -> Interval:
    """The (weighted) mean of values_N with its interval, resampling clusters; NaN values are left out.

    Args:
        clusters: the prompt of each row; None if each row stands for itself.
        support: the least and greatest possible mean; None if it has none.
    """
    bootstrap = bootstrap or Bootstrap()
    values_N = np.asarray(values, dtype=float)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=float)
    codes_N, num_clusters = cluster_codes(np.arange(len(values_N)) if clusters is None else clusters)
    sums_K, totals_K, n = _sums(values_N, weights_N, codes_N, num_clusters)
    present_K = totals_K > 0
    sums_K, totals_K = sums_K[present_K], totals_K[present_K]
    counts_RK = bootstrap.counts(len(sums_K))
    resampled_R = _ratio(counts_RK @ sums_K, counts_RK @ totals_K)
    value = float(_ratio(sums_K.sum(), totals_K.sum()))
    return bootstrap.interval(value, resampled_R, n=n, clusters=len(sums_K), support=support)


def difference_interval(
    values: ArrayLike,
    clusters: ArrayLike,
    baseline_values: ArrayLike,
    baseline_clusters: ArrayLike,
    *,
    bootstrap: Bootstrap | None = None,
    support: tuple[float, float] | None = DIFFERENCE,
) -> Interval:
    """mean(values) - mean(baseline_values), paired: both sides get the same resampled clusters.

    Only clusters that both sides have count; n is the number of `values` used.
    """
    bootstrap = bootstrap or Bootstrap()
    first_N, second_N = np.asarray(values, dtype=float), np.asarray(baseline_values, dtype=float)
    names = np.concatenate([np.asarray(clusters, dtype=str), np.asarray(baseline_clusters, dtype=str)])
    codes, num_clusters = cluster_codes(names)
    codes_first, codes_second = codes[: len(first_N)], codes[len(first_N) :]
    sums_K, totals_K, _ = _sums(first_N, np.ones_like(first_N), codes_first, num_clusters)
    base_sums_K, base_totals_K, _ = _sums(second_N, np.ones_like(second_N), codes_second, num_clusters)
    both_K = (totals_K > 0) & (base_totals_K > 0)
    sums_K, totals_K = sums_K[both_K], totals_K[both_K]
    base_sums_K, base_totals_K = base_sums_K[both_K], base_totals_K[both_K]
    counts_RK = bootstrap.counts(len(sums_K))
    resampled_R = _ratio(counts_RK @ sums_K, counts_RK @ totals_K) - _ratio(
        counts_RK @ base_sums_K, counts_RK @ base_totals_K
    )
    value = float(_ratio(sums_K.sum(), totals_K.sum()) - _ratio(base_sums_K.sum(), base_totals_K.sum()))
    return bootstrap.interval(
        value, resampled_R, n=int(totals_K.sum()), clusters=len(sums_K), support=support
    )


def auc(scores: ArrayLike, labels: ArrayLike, weights_RN: ArrayLike | None = None) -> Any:
    """The chance that a good row outscores a bad one, a tie counting half; NaN if there are none of either.

    Args:
        scores: scores_N.
        labels: labels_N, good where above one half.
        weights_RN: how often each row counts; R rows give R areas, None gives one float.
    """
    scores_N = np.asarray(scores, dtype=float)
    good_N = np.asarray(labels, dtype=float) > 0.5
    if scores_N.size == 0:
        return float("nan") if weights_RN is None else np.full(len(np.asarray(weights_RN)), np.nan)
    weights = np.ones((1, len(scores_N))) if weights_RN is None else np.asarray(weights_RN, dtype=float)
    order = np.argsort(scores_N, kind="stable")
    ranked = scores_N[order]
    starts_G = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    areas_R = np.empty(len(weights))
    for begin in range(0, len(weights), _CHUNK):
        chunk = weights[begin : begin + _CHUNK, order]
        good_RG = np.add.reduceat(chunk * good_N[order], starts_G, axis=1)
        bad_RG = np.add.reduceat(chunk * ~good_N[order], starts_G, axis=1)
        bad_below_RG = np.cumsum(bad_RG, axis=1) - bad_RG
        wins_R = (good_RG * (bad_below_RG + 0.5 * bad_RG)).sum(axis=1)
        areas_R[begin : begin + _CHUNK] = _ratio(wins_R, good_RG.sum(axis=1) * bad_RG.sum(axis=1))
    return float(areas_R[0]) if weights_RN is None else areas_R


def auc_within(
    scores: ArrayLike, labels: ArrayLike, categories: ArrayLike, weights_RN: ArrayLike | None = None
) -> Any:
    """The mean over categories of the area within each; categories without both labels are left out.

    So a score gains nothing from having another scale in each category.
    """
    scores_N, labels_N = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    codes_N, num_categories = cluster_codes(categories)
    weights = None if weights_RN is None else np.asarray(weights_RN, dtype=float)
    areas = [
        np.atleast_1d(
            auc(
                scores_N[codes_N == c],
                labels_N[codes_N == c],
                None if weights is None else weights[:, codes_N == c],
            )
        )
        for c in range(num_categories)
    ]
    rows = 1 if weights is None else len(weights)
    mean_R = _mean_present(np.array(areas).reshape(num_categories, rows))
    return float(mean_R[0]) if weights is None else mean_R


def same_prompt_pairs(scores: ArrayLike, labels: ArrayLike, prompts: ArrayLike) -> tuple[Floats, Floats]:
    """(correct_K, pairs_K) for each prompt.

    Pairs of a good and a bad image, and those ranked rightly (a tie is half).
    """
    scores_N, good_N = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float) > 0.5
    codes_N, num_prompts = cluster_codes(prompts)
    correct_K, pairs_K = np.zeros(num_prompts), np.zeros(num_prompts)
    for prompt in range(num_prompts):
        good, bad = scores_N[(codes_N == prompt) & good_N], scores_N[(codes_N == prompt) & ~good_N]
        difference = good[:, None] - bad[None, :]
        pairs_K[prompt] = difference.size
        correct_K[prompt] = (difference > 0).sum() + 0.5 * (difference == 0).sum()
    return correct_K, pairs_K


def pairwise_accuracy(
    scores: ArrayLike, labels: ArrayLike, prompts: ArrayLike, *, bootstrap: Bootstrap | None = None
) -> Interval:
    """Of all pairs of a good and a bad image of the SAME prompt, the share ranked rightly.

    n is the number of pairs.     The paper's measure of a reward (Lee et al. 2023, figure 3a).
    """
    correct_K, pairs_K = same_prompt_pairs(scores, labels, prompts)
    correct_K, pairs_K = correct_K[pairs_K > 0], pairs_K[pairs_K > 0]
    bootstrap = bootstrap or Bootstrap()
    counts_RK = bootstrap.counts(len(pairs_K))
    value = float(_ratio(correct_K.sum(), pairs_K.sum()))
    resampled_R = _ratio(counts_RK @ correct_K, counts_RK @ pairs_K)
    return bootstrap.interval(
        value, resampled_R, n=int(pairs_K.sum()), clusters=len(pairs_K), support=PROPORTION
    )


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's kappa of two yes/no readings: agreement beyond what their shares of yes give by chance.

    NaN without rows, or when both always say the same one thing.
    """
    first_N, second_N = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first_N.size == 0:
        return float("nan")
    agreed = float((first_N == second_N).mean())
    p, q = float(first_N.mean()), float(second_N.mean())
    by_chance = p * q + (1 - p) * (1 - q)
    return float("nan") if by_chance >= 1.0 else (agreed - by_chance) / (1.0 - by_chance)


def finite_rows(*columns: Sequence[Any] | ArrayLike) -> NDArray[np.bool_]:
    """Which rows are finite in every column."""
    finite: NDArray[np.bool_] = np.logical_and.reduce(
        [np.isfinite(np.asarray(column, dtype=float)) for column in columns]
    )
    return finite


@lru_cache(maxsize=8)
def _counts(seed: int, resamples: int, clusters: int) -> Floats:
    """Drawn once for all cells of a table with as many prompts; read-only, because it is shared."""
    counts_RK = np.zeros((resamples, clusters))
    if clusters:
        counts_RK += np.random.default_rng(seed).multinomial(clusters, [1.0 / clusters] * clusters, resamples)
    counts_RK.flags.writeable = False
    return counts_RK


def _sums(
    values_N: Floats, weights_N: Floats, codes_N: Codes, num_clusters: int
) -> tuple[Floats, Floats, int]:
    """For each cluster the weighted sum and the weight, and how many values there are.

    NaN values have no part.
    """
    there = np.isfinite(values_N)
    codes, weights = codes_N[there], weights_N[there]
    sums_K: Floats = np.bincount(codes, values_N[there] * weights, minlength=num_clusters).astype(float)
    totals_K: Floats = np.bincount(codes, weights, minlength=num_clusters).astype(float)
    return sums_K, totals_K, int(there.sum())


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Any:
    """numerator / denominator, NaN where the denominator is 0."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def _mean_present(values_CR: Floats) -> Floats:
    """The mean over the first axis of what is not NaN; NaN where all is."""
    present = np.isfinite(values_CR)
    mean_R: Floats = _ratio(np.where(present, values_CR, 0.0).sum(axis=0), present.sum(axis=0))
    return mean_R
