import random
from collections.abc import Hashable

import pytest

from accord.errors import FeedbackError
from accord.feedback.aggregate import (
    VoteCount,
    by_majority,
    by_reliability,
    find_aggregation,
    majority,
    shares_by_category,
)


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
    assert find_aggregation("majority") is by_majority
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


def test_weighted_labels_do_not_depend_on_the_order_of_arrival() -> None:
    draw = random.Random(0)
    items: dict[Hashable, list[tuple[str, str]]] = {
        (f"{n}", "p"): [(f"r{k}", draw.choice(["good", "bad", "skip"])) for k in draw.sample(range(9), 4)]
        for n in range(60)
    }
    first = by_reliability(items, {})
    for seed in range(5):
        shuffled = list(items.items())
        random.Random(seed).shuffle(shuffled)
        mixed = {key: random.Random(seed).sample(votes, len(votes)) for key, votes in shuffled}
        again = by_reliability(mixed, {})
        assert (again.label, again.weight, again.reliability) == (
            first.label,
            first.weight,
            first.reliability,
        )


def test_weighted_labels_of_what_nobody_decided() -> None:
    labels = by_reliability({"a": [("ann", "skip")], "b": [("ann", "good"), ("ann", "bad")]}, {"c": True})
    assert labels.label == {"a": None, "b": None}
    assert labels.weight == {"a": 0.0, "b": 0.0}
    with pytest.raises(FeedbackError, match="unknown verdict 'fine'"):
        by_reliability({"a": [("ann", "fine")]}, {})


def test_a_rater_who_judged_twice_has_one_voice() -> None:
    """In two campaigns, say: Ann does not outvote Ben."""
    twice = [("ann", "good"), ("ann", "good"), ("ben", "bad")]
    assert by_majority({"x": twice}, {}).label == {"x": None}
    torn = [("ann", "good"), ("ann", "bad"), ("ben", "bad")]
    assert by_majority({"x": torn}, {}).label == {"x": 0.0}
