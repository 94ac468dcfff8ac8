"""The reward against labels: made-up labels for which the answers are known."""

import numpy as np
import pandas as pd
import pytest

from accord.errors import AccordError
from accord.evaluation.reward_quality import auc_gain, label_quality, reward_quality, score_quality
from accord.evaluation.statistics import Bootstrap

QUICK = Bootstrap(0, 200)


def labelled(prompts: int = 30, split: str = "seen") -> pd.DataFrame:
    """Four images a prompt, two good. `reward` says so; `clip` only knows the category."""
    generator = np.random.default_rng(0)
    n = 4 * prompts
    category = np.repeat(np.where(np.arange(prompts) % 2, "count", "colour"), 4)
    label = np.tile([1.0, 1.0, 0.0, 0.0], prompts)
    return pd.DataFrame(
        {
            "prompt": np.repeat([f"prompt {i}" for i in range(prompts)], 4),
            "category": category,
            "split": split,
            "label": label,
            "reward": np.where(label > 0.5, 0.8, 0.2),
            "reward_no_auxiliary": np.where(label > 0.5, 0.6, 0.4) + generator.normal(0, 0.3, n),
            "clip": np.where(category == "count", 0.3, 0.2) + generator.normal(0, 0.01, n),
        }
    )


def test_a_perfect_reward() -> None:
    quality = score_quality(labelled(), "reward", probability=True, bootstrap=QUICK)
    assert quality["auc"]["value"] == quality["auc_within_category"]["value"] == 1.0
    assert quality["auc"]["low"] == pytest.approx(0.025 ** (1 / 30))  # never certain
    assert quality["pairwise_accuracy"]["value"] == 1.0
    assert quality["pairwise_accuracy"]["n"] == 30 * 4
    assert quality["auc_by_category"] == {"colour": 1.0, "count": 1.0}
    assert (quality["n"], quality["good"]) == (120, 60)
    # Predicts 0.2 and 0.8 where all are bad and all are good.
    assert quality["ece"] == pytest.approx(0.2)
    bins = [(b["predicted"], b["observed"], b["n"]) for b in quality["reliability"]]
    assert bins == [(pytest.approx(0.2), 0.0, 60), (pytest.approx(0.8), 1.0, 60)]


def test_a_score_that_only_knows_the_category_is_chance_within_it() -> None:
    rows = labelled(100)
    rows.loc[rows["category"] == "count", "label"] = [1.0, 1.0, 1.0, 0.0] * 50
    rows.loc[rows["category"] == "colour", "label"] = [1.0, 0.0, 0.0, 0.0] * 50
    quality = score_quality(rows, "clip", probability=False, bootstrap=QUICK)
    assert quality["auc"]["value"] > 0.65
    assert quality["auc_within_category"]["low"] < 0.5 < quality["auc_within_category"]["high"]
    assert quality["pairwise_accuracy"]["low"] < 0.5 < quality["pairwise_accuracy"]["high"]
    assert np.isnan(quality["ece"])
    assert quality["reliability"] == []


def test_labels_with_mistakes() -> None:
    rows = labelled()
    assert label_quality(rows) == label_quality(None) == {}  # of people the truth is not known
    rows["truth"] = rows["label"]
    wrong = rows.index % 12 == 0  # a good image in twelve images is called bad
    rows.loc[wrong, "label"] = 0.0
    found = label_quality(rows, bootstrap=QUICK)
    assert found["right"]["value"] == pytest.approx(11 / 12)
    assert found["right"]["low"] < 11 / 12 < found["right"]["high"]
    assert found["reward"]["truth"]["value"] == 1.0
    # Of 50 good and 70 bad ones, 10 have the score of good ones: ties.
    assert found["reward"]["label"]["value"] == pytest.approx((60 + 10 / 2) / 70)
    rows["truth"] = np.nan
    assert label_quality(rows) == {}


def test_gain_over_other_scores() -> None:
    gain = auc_gain(labelled(), "reward", "clip", bootstrap=QUICK)
    assert gain.value == pytest.approx(0.5, abs=0.1)
    assert gain.low > 0.3
    itself = auc_gain(labelled(), "reward_no_auxiliary", "reward_no_auxiliary", bootstrap=QUICK)
    assert itself.value == 0.0


def test_unlabelled_and_unscored_rows_are_left_out() -> None:
    rows = labelled()
    rows.loc[0, "label"] = np.nan
    rows.loc[4, "reward"] = np.nan
    assert score_quality(rows, "reward", probability=True, bootstrap=QUICK)["n"] == 118
    assert score_quality(rows, "clip", probability=False, bootstrap=QUICK)["n"] == 119


def test_by_split_with_nothing_where_there_are_no_labels() -> None:
    quality = reward_quality(labelled(split="unseen_object"), bootstrap=QUICK)
    assert set(quality) == {"reward", "reward_no_auxiliary", "clip", "reward_gain"}
    assert quality["reward"]["unseen_object"]["auc"]["value"] == 1.0
    assert quality["reward_gain"]["clip"]["unseen_object"]["low"] > 0
    assert quality["reward"]["seen"]["n"] == quality["reward"]["seen"]["auc"]["n"] == 0
    assert np.isnan(quality["reward"]["seen"]["auc"]["value"])
    assert quality["reward_gain"]["reward_no_auxiliary"]["seen"]["n"] == 0
    assert reward_quality(None, bootstrap=QUICK)["clip"]["seen"]["n"] == 0


def test_only_good_labels_have_no_ranking() -> None:
    rows = labelled()[lambda frame: frame["label"] == 1.0]
    quality = score_quality(rows, "reward", probability=True, bootstrap=QUICK)
    assert np.isnan(quality["auc"]["value"])
    assert quality["auc"]["n"] == quality["pairwise_accuracy"]["n"] == 0
    assert quality["ece"] == pytest.approx(0.2)


def test_missing_column_is_named() -> None:
    with pytest.raises(AccordError, match="clip"):
        reward_quality(labelled().drop(columns="clip"))
