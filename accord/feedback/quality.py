"""How much raters agree, and how far each can be trusted. Pure functions on ratings.

Ratings are one mapping an item: from a rater's name to what he said. Skips are left out by the caller: they
are missing, not wrong. Notation: N items, R raters, K values, n_ik = raters who gave item i the value k.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from accord.errors import FeedbackError

Rating = Mapping[str, str]
"""What each rater said of one item."""

_ITERATIONS = 200
_TOLERANCE = 1e-8
# One pseudo-vote of each kind, lightly leaning to "right": a rater of three votes is not believed blindly.
_PRIOR_RIGHT = 2.0
_PRIOR_WRONG = 1.0
_SUSPECT_JUDGED = 20
_SUSPECT_GOLD = 8


Tally = Mapping[tuple[int, ...], int]
"""Items by n_ik, how often each value was given to them: (2, 1) -> 7 are seven items with two votes for the
first value and one for the second. However many items there are, a tally is small.
"""


def tally(items: Iterable[Rating]) -> Tally:
    """The tally of items, with their values in the order of the alphabet."""
    counts = [Counter(item.values()) for item in items]
    values = sorted({value for count in counts for value in count})
    return Counter(tuple(count[value] for value in values) for count in counts)


def krippendorff_alpha(items: Sequence[Rating]) -> float | None:
    """Krippendorff's alpha for nominal data with missing values (Krippendorff 2011): 1 − D_o / D_e.

    1 is full agreement, 0 is chance, below 0 is worse than chance. None when nothing can be compared: fewer
    than two values of items that at least two raters judged. With one value only, agreement is full: 1.
    """
    return alpha_of(tally(items))


def alpha_of(items: Tally) -> float | None:
    """`krippendorff_alpha` of a tally."""
    total: Counter[int] = Counter()
    disagree = 0.0
    for n_K, number in items.items():
        m = sum(n_K)
        if m < 2:
            continue
        total.update({value: n * number for value, n in enumerate(n_K)})
        # ordered pairs of unlike values, each item weighing as much as it has values
        disagree += number * (m * m - sum(n * n for n in n_K)) / (m - 1)
    n = total.total()
    if n < 2:
        return None
    expected = (n * n - sum(count * count for count in total.values())) / (n - 1)
    return 1.0 if expected == 0 else 1.0 - disagree / expected


def fleiss_kappa(items: Sequence[Rating]) -> float | None:
    """Fleiss' kappa (1971): (P̄ − P̄_e) / (1 − P̄_e). None when it is not defined.

    Every item must have the same number of ratings, at least two: of a campaign that is under way, the items
    with the most common number are taken.
    """
    return kappa_of(tally(items))


def kappa_of(items: Tally) -> float | None:
    """`fleiss_kappa` of a tally."""
    sizes: Counter[int] = Counter()
    for n_K, number in items.items():
        if sum(n_K) > 1:
            sizes[sum(n_K)] += number
    if not sizes:
        return None
    n = max(sizes, key=lambda size: (sizes[size], size))
    agreement = 0.0
    total: Counter[int] = Counter()
    for n_K, number in items.items():
        if sum(n_K) == n:
            agreement += number * (sum(c * c for c in n_K) - n) / (n * (n - 1))
            total.update({value: count * number for value, count in enumerate(n_K)})
    agreement /= sizes[n]
    chance = sum((count / total.total()) ** 2 for count in total.values())
    return 1.0 if chance == 1 else (agreement - chance) / (1 - chance)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Both coefficients over `items` items that at least two raters judged."""

    items: int
    alpha: float | None
    kappa: float | None


def agreement_by_category(items: Sequence[Rating], categories: Sequence[str]) -> dict[str, Agreement]:
    """By category, and last in "total"."""
    values = sorted({value for item in items for value in item.values()})
    tallies: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for item, category in zip(items, categories, strict=True):
        counts = Counter(item.values())
        tallies[category][tuple(counts[value] for value in values)] += 1
    return agreement_of(tallies)


def agreement_of(tallies: Mapping[str, Tally]) -> dict[str, Agreement]:
    """By category, and last in "total"; tallies of one order of values. Without what nobody can compare."""
    compared = {
        name: {n_K: number for n_K, number in items.items() if sum(n_K) > 1}
        for name, items in sorted(tallies.items())
    }
    compared = {name: items for name, items in compared.items() if items}
    if not compared:
        return {}
    total: Counter[tuple[int, ...]] = Counter()
    for items in compared.values():
        total.update(items)
    return {
        name: Agreement(sum(items.values()), alpha_of(items), kappa_of(items))
        for name, items in {**compared, "total": total}.items()
    }


@dataclasses.dataclass(frozen=True)
class DawidSkene:
    """The model's estimates.

    `truth_NK` are probabilities of the values (in the order of `values`), `confusion_RKK[r, k, l]` the
    probability that rater r (of `raters`) says l of an item whose truth is k.
    """

    values: tuple[str, ...]
    raters: tuple[str, ...]
    truth_NK: NDArray[np.float64]
    prior_K: NDArray[np.float64]
    confusion_RKK: NDArray[np.float64]


def dawid_skene(items: Sequence[Sequence[tuple[str, str]]], values: Sequence[str]) -> DawidSkene:
    """Dawid and Skene's (1979) maximum-likelihood estimates by EM, started from the shares of votes.

    Args:
        items: the (rater, value) pairs of each item; a rater may rate an item more than once.
        values: what can be said.

    Raises:
        FeedbackError: there are no items, one without ratings, or a value that is none of `values`.
    """
    raters = tuple(sorted({rater for item in items for rater, _ in item}))
    counts_NRK = _counts(items, raters, values)
    truth_NK = counts_NRK.sum(axis=1)
    truth_NK /= truth_NK.sum(axis=1, keepdims=True)
    for _ in range(_ITERATIONS):
        prior_K = truth_NK.mean(axis=0)  # their (2.4)
        joint_RKK = np.einsum("nk,nrl->rkl", truth_NK, counts_NRK)
        confusion_RKK = joint_RKK / np.maximum(joint_RKK.sum(axis=2, keepdims=True), 1e-300)  # their (2.3)
        log_NK = np.log(np.maximum(prior_K, 1e-300)) + np.einsum(
            "nrl,rkl->nk", counts_NRK, np.log(np.maximum(confusion_RKK, 1e-300))
        )
        new_NK = np.exp(log_NK - log_NK.max(axis=1, keepdims=True))  # their (2.5)
        new_NK /= new_NK.sum(axis=1, keepdims=True)
        change = float(np.abs(new_NK - truth_NK).max())
        truth_NK = new_NK
        if change < _TOLERANCE:
            break
    return DawidSkene(tuple(values), raters, truth_NK, prior_K, confusion_RKK)


def _counts(
    items: Sequence[Sequence[tuple[str, str]]], raters: Sequence[str], values: Sequence[str]
) -> NDArray[np.float64]:
    if not items or not all(items):
        raise FeedbackError("there is nothing to estimate: no items, or an item that nobody judged")
    rater_index = {name: index for index, name in enumerate(raters)}
    value_index = {name: index for index, name in enumerate(values)}
    counts_NRK = np.zeros((len(items), len(raters), len(values)))
    for number, item in enumerate(items):
        for rater, value in item:
            if value not in value_index:
                raise FeedbackError(f"unknown value {value!r}; expected {', '.join(values)}")
            counts_NRK[number, rater_index[rater], value_index[value]] += 1
    return counts_NRK


@dataclasses.dataclass(frozen=True)
class Weighted:
    """What raters' votes are worth, and what they come to.

    `good` is the estimated probability that each item is good; `reliability` the one that a rater is right.
    """

    good: Mapping[Hashable, float]
    reliability: Mapping[str, float]


def weigh(
    votes: Mapping[Hashable, Mapping[str, bool]], known: Mapping[Hashable, bool] | None = None
) -> Weighted:
    """Each rater's reliability, and from it each item's: one-coin Dawid and Skene, with known (gold) items.

    A rater r is right with probability p_r whatever the truth; P(good) of an item is the logistic function of
    the sum of his votes' log-odds ± log(p_r / (1 − p_r)) and the prior's. So a vote of p_r = 0.5 is worth
    nothing, and an adversary's counts against what he says. With so few numbers to learn it needs few votes.

    The order of the votes does not matter: items and raters are taken by name.

    Args:
        votes: by item: rater -> whether he said good.
        known: truths of some of the items; they stay as they are.
    """
    fixed = known or {}
    names = sorted({rater for given in votes.values() for rater in given})
    keys = sorted((key for key in votes if votes[key]), key=repr)
    if not keys:
        return Weighted({}, {})
    index = {name: number for number, name in enumerate(names)}
    pairs = [
        (row, index[rater], said)
        for row, key in enumerate(keys)
        for rater, said in sorted(votes[key].items())
    ]
    item_V, rater_V, said_V = (np.array(column) for column in zip(*pairs, strict=True))
    truth_N = np.array([float(fixed[key]) if key in fixed else np.nan for key in keys])
    coins = _Coins(item_V, rater_V, said_V.astype(bool), truth_N, len(names))
    # Only gold tells who is to be believed at first; without any, all are believed alike: the majority.
    reliable_R = coins.reliable(truth_N, ~np.isnan(truth_N))
    good_N = coins.good(reliable_R, prior=0.5)
    for _ in range(_ITERATIONS):
        reliable_R = coins.reliable(good_N, np.ones(len(keys), dtype=bool))
        new_N = coins.good(reliable_R, prior=float(good_N.sum() + 1) / (len(keys) + 2))
        change = float(np.abs(new_N - good_N).max())
        good_N = new_N
        if change < _TOLERANCE:
            break
    # Rounded: sums in another order differ in the last digits, and a digest must not.
    return Weighted(
        {key: round(float(p), 9) for key, p in zip(keys, good_N, strict=True)},
        {name: round(float(p), 9) for name, p in zip(names, reliable_R, strict=True)},
    )


@dataclasses.dataclass(frozen=True)
class _Coins:
    """V votes: of which item, whose, and whether it says good. `truth_N` is NaN where it is not known."""

    item_V: NDArray[np.int64]
    rater_V: NDArray[np.int64]
    said_V: NDArray[np.bool_]
    truth_N: NDArray[np.float64]
    raters: int

    def reliable(self, good_N: NDArray[np.float64], used_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """M step: each rater's expected share of right votes on the items that are used, with the prior's."""
        p_V = good_N[self.item_V]
        right_V = np.where(used_N[self.item_V], np.where(self.said_V, p_V, 1 - p_V), 0.0)
        right_R = np.bincount(self.rater_V, weights=right_V, minlength=self.raters)
        votes_R = np.bincount(self.rater_V, weights=used_N[self.item_V].astype(float), minlength=self.raters)
        reliable_R: NDArray[np.float64] = (right_R + _PRIOR_RIGHT) / (votes_R + _PRIOR_RIGHT + _PRIOR_WRONG)
        return reliable_R

    def good(self, reliable_R: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
        """E step: P(good) of each item; the truth where it is known."""
        odds_V = np.where(self.said_V, 1, -1) * np.log(reliable_R / (1 - reliable_R))[self.rater_V]
        log_odds_N = np.log(prior / (1 - prior)) + np.bincount(
            self.item_V, weights=odds_V, minlength=len(self.truth_N)
        )
        estimated_N = 1 / (1 + np.exp(-np.clip(log_odds_N, -500, 500)))
        return np.where(np.isnan(self.truth_N), estimated_N, self.truth_N)


def suspected(reliability: float | None, judged: int, gold_accuracy: float | None, gold_judged: int) -> bool:
    """Whether a rater is probably wrong more often than right: by his estimated reliability, or on gold.

    Both must be below one half by more than their standard error, and rest on at least 20 judgements, or 8 of
    gold. It is a reason to look at him, and no proof: nobody is excluded by it.
    """
    by_model = reliability is not None and judged >= _SUSPECT_JUDGED and _below_half(reliability, judged)
    by_gold = (
        gold_accuracy is not None and gold_judged >= _SUSPECT_GOLD and _below_half(gold_accuracy, gold_judged)
    )
    return by_model or by_gold


def _below_half(share: float, number: int) -> bool:
    return share + 0.5 / math.sqrt(number) < 0.5
