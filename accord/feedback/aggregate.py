"""From many raters' votes to one label, and to the distribution of votes. Pure functions."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from accord.errors import FeedbackError
from accord.feedback.tables import VERDICTS


@dataclasses.dataclass(frozen=True)
class VoteCount:
    """How often `verdict` was given to one candidate."""

    image: str
    prompt: str
    category: str
    split: str
    verdict: str
    count: int


def majority(votes: Sequence[str]) -> float | None:
    """1.0 when more votes are good than bad, 0.0 when more are bad; None for a tie and when all were skips.

    Raises:
        FeedbackError: a vote that is none of `VERDICTS`.
    """
    counts = Counter(votes)
    unknown = sorted(set(counts) - set(VERDICTS))
    if unknown:
        raise FeedbackError(f"unknown verdict {unknown[0]!r}; expected {', '.join(VERDICTS)}")
    if counts["good"] == counts["bad"]:
        return None
    return float(counts["good"] > counts["bad"])


AGGREGATIONS: Mapping[str, Callable[[Sequence[str]], float | None]] = {"majority": majority}


def find_aggregation(name: str) -> Callable[[Sequence[str]], float | None]:
    """The aggregation of that name.

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
    return {category: _shares(votes[category], len(judged[category])) for category in order}


def _shares(votes: Counter[str], candidates: int) -> dict[str, float]:
    total = votes.total()
    shares = {verdict: votes[verdict] / total for verdict in VERDICTS}
    return {"candidates": candidates, "judgements": total, **shares}
