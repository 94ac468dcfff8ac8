"""Agreement and estimates against published worked examples."""

from collections.abc import Hashable

import numpy as np
import pytest

from accord.errors import FeedbackError
from accord.feedback.quality import (
    Rating,
    agreement_by_category,
    dawid_skene,
    fleiss_kappa,
    krippendorff_alpha,
    suspected,
    weigh,
)

# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), part C: 4 observers, 12 units.
KRIPPENDORFF_2011 = """\
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""

# Wikipedia's computational example, of three coders and 15 units: alpha = 0.691. It is also the example of
# github.com/dallascard/krippendorff_alpha.
THREE_CODERS = """\
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4"""

# Wikipedia's worked example of Fleiss' kappa, as numbers of ratings: 14 raters, 10 subjects, 5 categories.
# It is also that of github.com/dnafinder/Fleiss, which gives kappa = 0.2099.
FLEISS = """\
0 0 0 0 14
0 2 6 4 2
0 0 3 5 6
0 3 9 2 0
2 2 8 1 1
7 7 0 0 0
3 2 6 3 0
2 5 3 2 2
6 5 2 1 0
0 2 2 3 7"""

# Dawid and Skene (1979), table 1: 45 patients, five anaesthetists, the first of whom judged three times.
# Checked against the data in github.com/dallascard/dawid_skene (at 9f49db7), an independent implementation.
# The four digits below are its estimates at convergence; the paper's table 2 shows the first two of them.
ANAESTHETISTS = """\
111/1/1/1/1 333/4/3/3/4 112/2/1/2/2 222/3/1/2/1 222/3/2/2/2 222/3/3/2/2 122/2/1/1/1 333/3/4/3/3
222/2/2/2/3 232/2/2/2/3 444/4/4/4/4 222/3/3/4/3 111/1/1/1/1 222/3/2/1/2 121/1/1/1/1 111/2/1/1/1
111/1/1/1/1 111/1/1/1/1 222/2/2/2/1 222/1/3/2/2 222/2/2/2/2 222/2/2/2/1 222/3/2/2/2 221/2/2/2/2
111/1/1/1/1 111/1/1/1/1 232/2/2/2/2 111/1/1/1/1 111/1/1/1/1 112/1/1/2/1 111/1/1/1/1 333/3/2/3/3
111/1/1/1/1 222/2/2/2/2 222/3/2/3/2 433/4/3/4/3 221/2/2/3/2 232/3/2/3/3 333/3/4/3/2 111/1/1/1/1
111/1/1/1/1 121/2/1/1/1 232/2/2/2/2 121/1/1/1/1 222/2/2/2/2"""


ANAESTHETISTS_PRIOR = [0.3996, 0.4220, 0.1118, 0.0667]
ANAESTHETISTS_CONFUSION = """\
.8895 .1105 0 0  .0706 .8764 .0530 0  0 .3388 .6612 0  0 0 .5556 .4444
.8342 .1658 0 0  .0527 .6329 .3143 0  0 0 1 0  0 0 0 1
1 0 0 0  .1064 .7883 .1053 0  0 .4037 .1988 .3976  0 0 .6667 .3333
.9444 .0556 0 0  .0537 .8426 .1037 0  0 0 .8012 .1988  0 0 .3333 .6667
1 0 0 0  .1590 .7345 .1064 0  0 .2091 .7909 0  0 0 .3333 .6667"""


def _units(table: str) -> list[Rating]:
    rows = [line.split() for line in table.splitlines()]
    return [
        {f"rater {number}": value for number, value in enumerate(column) if value != "."}
        for column in zip(*rows, strict=True)
    ]


def _subjects(table: str) -> list[Rating]:
    subjects = []
    for line in table.splitlines():
        values = [str(kind) for kind, count in enumerate(line.split()) for _ in range(int(count))]
        subjects.append({f"rater {number}": value for number, value in enumerate(values)})
    return subjects


def _patients() -> list[list[tuple[str, str]]]:
    return [
        [(f"{rater}", value) for rater, values in enumerate(patient.split("/")) for value in values]
        for patient in ANAESTHETISTS.split()
    ]


def test_alpha_of_the_published_examples() -> None:
    assert krippendorff_alpha(_units(KRIPPENDORFF_2011)) == pytest.approx(0.743, abs=0.0005)
    assert krippendorff_alpha(_units(THREE_CODERS)) == pytest.approx(0.691, abs=0.0005)


def test_kappa_of_the_published_example() -> None:
    assert fleiss_kappa(_subjects(FLEISS)) == pytest.approx(0.2099, abs=0.00005)


def test_agreement_where_there_is_little_to_say() -> None:
    full: list[Rating] = [{"a": "good", "b": "good"}, {"a": "bad", "b": "bad"}]
    assert krippendorff_alpha(full) == fleiss_kappa(full) == 1
    against: list[Rating] = [{"a": "good", "b": "bad"}, {"a": "bad", "b": "good"}]
    assert fleiss_kappa(against) == -1
    assert krippendorff_alpha(against) == pytest.approx(-0.5)
    for few in ([], [{}], [{"a": "good"}, {"b": "bad"}]):
        assert krippendorff_alpha(few) is None
        assert fleiss_kappa(few) is None
    same: list[Rating] = [{"a": "good", "b": "good"}]
    assert krippendorff_alpha(same) == fleiss_kappa(same) == 1


def test_agreement_by_category() -> None:
    items: list[Rating] = [
        {"a": "good", "b": "good"},
        {"a": "bad", "b": "bad"},
        {"a": "good", "b": "bad"},
        {"a": "good"},
    ]
    found = agreement_by_category(items, ["colour", "colour", "count", "count"])
    assert list(found) == ["colour", "count", "total"]
    assert (found["colour"].alpha, found["colour"].items, found["total"].items) == (1, 2, 3)
    assert agreement_by_category([], []) == {}


def test_dawid_skene_of_the_published_example() -> None:
    """And the posteriors, which are published nowhere, against their formulas written out naively."""
    model = dawid_skene(_patients(), "1234")
    assert model.prior_K == pytest.approx(ANAESTHETISTS_PRIOR, abs=0.0001)
    published_RKK = np.array(ANAESTHETISTS_CONFUSION.split(), dtype=float).reshape(5, 4, 4)
    assert np.abs(model.confusion_RKK - published_RKK).max() < 0.0001
    truth, prior = _naive_dawid_skene(_patients(), "1234")
    assert np.abs(model.truth_NK - truth).max() < 0.0005
    assert np.abs(model.prior_K - prior).max() < 0.0005


def _naive_dawid_skene(
    items: list[list[tuple[str, str]]], values: str
) -> tuple[list[list[float]], list[float]]:
    truth = [[sum(v == k for _, v in item) / len(item) for k in values] for item in items]
    prior: list[float] = []
    for _ in range(500):
        prior = [sum(row[k] for row in truth) / len(items) for k in range(len(values))]
        said: dict[tuple[str, int, str], float] = {}
        for item, row in zip(items, truth, strict=True):
            for rater, value in item:
                for k in range(len(values)):
                    said[rater, k, value] = said.get((rater, k, value), 0.0) + row[k]
        for number, item in enumerate(items):
            row = list(prior)
            for rater, value in item:
                for k in range(len(values)):
                    whole = sum(said.get((rater, k, other), 0.0) for other in values)
                    row[k] *= said[rater, k, value] / whole if whole else 0.0
            truth[number] = [p / sum(row) for p in row]
    return truth, prior


def test_dawid_skene_refuses_what_it_cannot_estimate() -> None:
    for items, message in (
        ([], "nothing to estimate"),
        ([[]], "nothing"),
        ([[("a", "z")]], "unknown value 'z'"),
    ):
        with pytest.raises(FeedbackError, match=message):
            dawid_skene(items, ["good", "bad"])


ACCURACY = {"ann": 0.95, "bob": 0.8, "cat": 0.6, "eve": 0.1}


def _simulate(seed: int, items: int) -> tuple[dict[Hashable, bool], dict[Hashable, dict[str, bool]]]:
    draw = np.random.default_rng(seed)
    truth: dict[Hashable, bool] = {item: bool(draw.random() < 0.5) for item in range(items)}
    votes: dict[Hashable, dict[str, bool]] = {
        item: {rater: bool(good == (draw.random() < p)) for rater, p in ACCURACY.items()}
        for item, good in truth.items()
    }
    return truth, votes


@pytest.mark.parametrize("seed", range(5))
def test_weighted_labels_beat_the_majority_and_the_adversary_is_found(seed: int) -> None:
    truth, votes = _simulate(seed, items=200)  # so that each rater gives 200 votes
    weighed = weigh(votes)
    weighted = np.mean([(weighed.good[item] > 0.5) == good for item, good in truth.items()])
    halves = {item: sum(given.values()) / len(given) for item, given in votes.items()}
    majority = np.mean([0.5 if halves[i] == 0.5 else (halves[i] > 0.5) == good for i, good in truth.items()])
    assert weighted > majority + 0.1
    found = {
        rater for rater, reliability in weighed.reliability.items() if suspected(reliability, 200, None, 0)
    }
    assert found == {"eve"}
    for rater, p in ACCURACY.items():
        assert weighed.reliability[rater] == pytest.approx(p, abs=0.12)


def test_gold_turns_a_hostile_majority() -> None:
    """Three adversaries of five raters: without gold they are believed, with it they are found."""
    truth, _ = _simulate(0, 100)
    votes: dict[Hashable, dict[str, bool]] = {
        item: {**{f"eve {n}": not good for n in range(3)}, "ann": good, "bob": good}
        for item, good in truth.items()
    }
    believed = weigh(votes)
    assert np.mean([(believed.good[item] > 0.5) == good for item, good in truth.items()]) == 0
    known = {item: truth[item] for item in range(10)}
    weighed = weigh(votes, known)
    assert all((weighed.good[item] > 0.5) == good for item, good in truth.items())
    assert weighed.reliability["ann"] > 0.9 > 0.1 > weighed.reliability["eve 1"]


def test_suspicion_needs_evidence() -> None:
    assert not suspected(0.1, 19, None, 0)
    assert suspected(0.1, 20, None, 0)
    assert not suspected(0.48, 50, None, 0)
    assert suspected(None, 0, 0.2, 8)
    assert not suspected(None, 0, 0.2, 7)
