"""Best of n: generate n images, keep the one with the highest reward.

With M candidates of a prompt, the expectation over all subsets of n is exact: the candidate of rank k (0 is
best) is the best of a random subset with probability C(M-1-k, n-1) / C(M, n).

Shapes: M candidates of one prompt, N rows, P prompts.
"""

from math import comb

import numpy as np
from numpy.typing import ArrayLike

from accord.evaluation.statistics import Bootstrap, Floats, Interval, bootstrap_interval, cluster_codes


def rank_weights(candidates: int, n: int) -> Floats:
    """weight_M: the chance that each rank is the best of a random subset of n.

    All 0 if there are fewer than n.
    """
    if not 1 <= n <= candidates:
        return np.zeros(candidates)
    subsets = comb(candidates, n)
    return np.array([comb(candidates - 1 - k, n - 1) / subsets for k in range(candidates)])


def best_of_n(rewards: ArrayLike, success: ArrayLike, n: int) -> float:
    """The expected success of the highest-reward image of a random n of M; NaN if M is less than n.

    Of equal rewards each is equally likely to be picked.
    """
    rewards_M, success_M = np.asarray(rewards, dtype=float), np.asarray(success, dtype=float)
    if not 1 <= n <= len(rewards_M):
        return float("nan")
    order = np.argsort(-rewards_M, kind="stable")
    weights_M = rank_weights(len(rewards_M), n)
    _, group_M = np.unique(rewards_M[order], return_inverse=True)
    group_M = group_M.reshape(-1)
    shared_M = (np.bincount(group_M, weights=weights_M) / np.bincount(group_M))[group_M]
    return float(shared_M @ success_M[order])


def any_of_n(success: ArrayLike, n: int) -> float:
    """The chance that a random n of M holds a success: what a perfect reward would reach."""
    success_M = np.asarray(success, dtype=float) > 0.5
    candidates, bad = len(success_M), int((~success_M).sum())
    if not 1 <= n <= candidates:
        return float("nan")
    return 1.0 - comb(bad, n) / comb(candidates, n)


def best_of_interval(
    rewards: ArrayLike, success: ArrayLike, prompts: ArrayLike, n: int, *, bootstrap: Bootstrap | None = None
) -> tuple[Interval, float]:
    """(success of best of n, that of a perfect reward), over prompts with at least n candidates.

    The interval's n is the number of prompts.
    """
    rewards_N, success_N = np.asarray(rewards, dtype=float), np.asarray(success, dtype=float)
    codes_N, num_prompts = cluster_codes(prompts)
    rows = [np.flatnonzero(codes_N == prompt) for prompt in range(num_prompts)]
    chosen_P = np.array([best_of_n(rewards_N[row], success_N[row], n) for row in rows], dtype=float)
    perfect_P = np.array([any_of_n(success_N[row], n) for row in rows], dtype=float)
    interval = bootstrap_interval(chosen_P, bootstrap=bootstrap)
    present = np.isfinite(perfect_P)
    return interval, float(perfect_P[present].mean()) if present.any() else float("nan")
