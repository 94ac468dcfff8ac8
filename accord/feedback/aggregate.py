"""From many raters' votes to one label, and to the distribution of votes. Pure functions."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from accord.errors import FeedbackError
from accord.feedback.quality import weigh
from accord.feedback.tables import VERDICTS

Votes = Sequence[tuple[str, str]]
"""(rater, verdict) of one candidate, in any order."""


@dataclasses.dataclass(frozen=True)
class VoteCount:
    """How often `verdict` was given to one candidate."""

    image: str
    prompt: str
    category: str
    split: str
    verdict: str
    count: int


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the votes come to.

    `label` is 1.0 (good), 0.0 (bad) or None when the votes do not decide; `weight` is 0 without a label, and
    else at most 1. `reliability` is the estimated probability that a rater is right, where it was estimated.
    """

    label: Mapping[Hashable, float | None]
    weight: Mapping[Hashable, float]
    reliability: Mapping[str, float]


def majority(votes: Sequence[str]) -> float | None:
    """1.0 when more votes are good than bad, 0.0 when more are bad; None for a tie and when all were skips.

    Raises:
        FeedbackError: a vote that is none of `VERDICTS`.
    """
    _check(votes)
    counts = Counter(votes)
    if counts["good"] == counts["bad"]:
        return None
    return float(counts["good"] > counts["bad"])


def by_majority(items: Mapping[Hashable, Votes], known: Mapping[Hashable, bool]) -> Labels:
    """Every rater counts the same; what is known otherwise (gold) does not matter.

    A rater who judged an item twice (in two campaigns, say) has one vote, his majority.
    """
    labels = {key: majority(_voices(votes)) for key, votes in items.items()}
    return Labels(labels, {key: float(label is not None) for key, label in labels.items()}, {})


def by_reliability(items: Mapping[Hashable, Votes], known: Mapping[Hashable, bool]) -> Labels:
    """Votes count by their rater's reliability, estimated from all of them: see `quality.weigh`.

    The weight of a label is how sure it is: |2 P(good) − 1|. A rater who judged an item twice has one vote,
    his majority. The order of the votes does not matter.
    """
    single: dict[Hashable, dict[str, bool]] = {}
    for key, votes in items.items():
        decided = {rater: majority(verdicts) for rater, verdicts in _by_rater(votes).items()}
        found = {rater: label == 1.0 for rater, label in decided.items() if label is not None}
        if found:
            single[key] = found
    weighed = weigh(single, {key: truth for key, truth in known.items() if key in single})
    sure = {key: 2 * weighed.good[key] - 1 if key in single else 0.0 for key in items}
    return Labels(
        {key: None if value == 0 else float(value > 0) for key, value in sure.items()},
        {key: round(abs(value), 6) for key, value in sure.items()},
        weighed.reliability,
    )


def _by_rater(votes: Votes) -> dict[str, list[str]]:
    given: dict[str, list[str]] = defaultdict(list)
    for rater, verdict in votes:
        given[rater].append(verdict)
    return given


def _voices(votes: Votes) -> list[str]:
    """One verdict a rater; "skip" where his own do not decide."""
    decided = (majority(verdicts) for verdicts in _by_rater(votes).values())
    return ["skip" if label is None else "good" if label else "bad" for label in decided]


Aggregation = Callable[[Mapping[Hashable, Votes], Mapping[Hashable, bool]], Labels]

AGGREGATIONS: Mapping[str, Aggregation] = {"majority": by_majority, "weighted": by_reliability}


def find_aggregation(name: str) -> Aggregation:
    """The aggregation of that name: from all votes by item, and truths that are known, to `Labels`.

    Raises:
        FeedbackError: there is none.
    """
    if name not in AGGREGATIONS:
        raise FeedbackError(f"unknown aggregation {name!r}; expected {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[name]


def shares_by_category(counts: Iterable[VoteCount]) -> dict[str, dict[str, float]]:
    """Table 2 of Lee et al. 2023: for each category, and last for "total", what was judged and how.

    Each row has `candidates` and `judgements` (numbers), and `good`, `bad` and `skip` (shares of the
    judgements, which sum to 1).
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    judged: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in counts:
        for category in (row.category, "total"):
            votes[category][row.verdict] += row.count
            judged[category].add((row.image, row.prompt))
    order = [*sorted(votes.keys() - {"total"}), *(["total"] if votes else [])]
    return {category: shares_of(votes[category], len(judged[category])) for category in order}


def _check(votes: Iterable[str]) -> None:
    unknown = sorted(set(votes) - set(VERDICTS))
    if unknown:
        raise FeedbackError(f"unknown verdict {unknown[0]!r}; expected {', '.join(VERDICTS)}")


def shares_of(votes: Counter[str], candidates: int) -> dict[str, float]:
    """A row of `shares_by_category`: of so many votes, of so many candidates."""
    total = votes.total()
    shares = {verdict: votes[verdict] / total for verdict in VERDICTS}
    return {"candidates": candidates, "judgements": total, **shares}
