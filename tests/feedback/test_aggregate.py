import pytest

from accord.errors import FeedbackError
from accord.feedback.aggregate import VoteCount, find_aggregation, majority, shares_by_category


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        (["good"], 1.0),
        (["bad"], 0.0),
        (["good", "good", "bad"], 1.0),
        (["bad", "good", "bad"], 0.0),
        (["good", "skip", "skip"], 1.0),  # a skip is no vote, however many there are
        (["skip", "bad", "skip", "skip"], 0.0),
        (["good", "bad"], None),
        (["good", "bad", "skip"], None),
        (["skip", "skip"], None),
        ([], None),
    ],
)
def test_majority(votes: list[str], label: float | None) -> None:
    assert majority(votes) == label


def test_majority_refuses_an_unknown_verdict() -> None:
    with pytest.raises(FeedbackError, match=r"unknown verdict 'Good'; expected good, bad, skip"):
        majority(["good", "Good"])


def test_unknown_aggregation() -> None:
    assert find_aggregation("majority") is majority
    with pytest.raises(FeedbackError, match="unknown aggregation 'mean'; expected majority"):
        find_aggregation("mean")


def test_shares_by_category() -> None:
    counts = [
        VoteCount("a", "two stars", "count", "seen", "good", 3),
        VoteCount("a", "two stars", "count", "seen", "bad", 1),
        VoteCount("b", "two stars", "count", "seen", "skip", 4),
        VoteCount("b", "red star", "colour", "seen", "bad", 2),
    ]
    assert shares_by_category(counts) == {
        "colour": {"candidates": 1, "judgements": 2, "good": 0.0, "bad": 1.0, "skip": 0.0},
        "count": {"candidates": 2, "judgements": 8, "good": 0.375, "bad": 0.125, "skip": 0.5},
        "total": {"candidates": 3, "judgements": 10, "good": 0.3, "bad": 0.3, "skip": 0.4},
    }
    assert list(shares_by_category(counts))[-1] == "total"
    assert shares_by_category([]) == {}
