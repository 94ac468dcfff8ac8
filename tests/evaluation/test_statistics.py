"""Intervals and ranking quality against values worked out by hand."""

import numpy as np
import pytest

from accord.evaluation.statistics import (
    Bootstrap,
    Interval,
    auc,
    auc_within,
    bootstrap_interval,
    difference_interval,
    kappa,
    pairwise_accuracy,
)

NAN = float("nan")


def test_mean_weights_and_missing_values() -> None:
    assert bootstrap_interval([1.0, 0.0, 0.0, NAN], ["a", "a", "b", "b"]).value == pytest.approx(1 / 3)
    assert bootstrap_interval([1.0, 0.0, 0.0, NAN], ["a", "a", "b", "b"]).n == 3
    assert bootstrap_interval([1.0, 0.0], ["a", "b"], weights=[3.0, 1.0]).value == pytest.approx(0.75)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_nothing_to_estimate_from_is_nan_with_n_zero(values: list[float]) -> None:
    result = bootstrap_interval(values, ["a"] * len(values))
    assert np.isnan([result.value, result.low, result.high]).all()
    assert result.n == 0
    assert difference_interval(values, ["a"] * len(values), [1.0], ["a"]).n == 0


def test_interval_covers_a_binomial_share_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = [
        result.low <= 0.3 <= result.high
        for trial in range(200)
        if (result := bootstrap_interval(generator.random(80) < 0.3, bootstrap=Bootstrap(trial, 200)))
    ]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_interval_width_is_the_binomial_one_for_single_images_and_wider_for_clusters() -> None:
    values = np.repeat([1.0, 0.0], 200)  # 100 prompts of four images that all agree
    single = bootstrap_interval(values, bootstrap=Bootstrap(0, 4000))
    clustered = bootstrap_interval(values, np.repeat(np.arange(100), 4), bootstrap=Bootstrap(0, 4000))
    assert single.high - single.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.07)
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 100), rel=0.07)


def test_no_success_in_12_prompts_has_the_exact_upper_bound_not_zero() -> None:
    none = bootstrap_interval(np.zeros(48), np.repeat(np.arange(12), 4))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 12))  # Clopper and Pearson for 0 of 12: 0.265
    every = bootstrap_interval(np.ones(48), np.repeat(np.arange(12), 4))
    assert every.low == pytest.approx(0.025 ** (1 / 12))
    unbounded = bootstrap_interval([5.0, 5.0], ["a", "b"], support=None)
    assert unbounded.value == 5.0
    assert np.isnan(unbounded.low)


def test_same_seed_same_interval_whatever_the_order_of_rows() -> None:
    generator = np.random.default_rng(1)
    values, prompts = generator.random(60) < 0.4, generator.integers(0, 15, 60)
    order = generator.permutation(60)
    first = bootstrap_interval(values, prompts, bootstrap=Bootstrap(3))
    assert first == bootstrap_interval(values[order], prompts[order], bootstrap=Bootstrap(3))
    assert first != bootstrap_interval(values, prompts, bootstrap=Bootstrap(4))


def test_difference_is_paired_by_prompt_and_leaves_out_what_one_side_lacks() -> None:
    prompts = np.repeat(np.arange(20), 2)
    base = np.repeat([0.0, 1.0], 20)
    shifted = difference_interval(base + 0.1, prompts, base, prompts, support=None)
    assert shifted.value == pytest.approx(0.1)
    # Each prompt differs by exactly 0.1, so resampling prompts changes nothing, though the means vary widely.
    assert np.isnan(shifted.low)
    lonely = difference_interval([1.0, 0.0], ["a", "b"], [1.0], ["a"])
    assert (lonely.value, lonely.n) == (0.0, 1)


def test_difference_of_two_shares_has_the_textbook_width() -> None:
    prompts = np.arange(400)
    generator = np.random.default_rng(2)
    first, second = generator.random(400) < 0.5, generator.random(400) < 0.3
    found = difference_interval(first, prompts, second, prompts, bootstrap=Bootstrap(0, 4000))
    expected = 2 * 1.96 * np.sqrt((first * 1.0 - second).var() / 400)
    assert found.high - found.low == pytest.approx(expected, rel=0.07)


def test_auc_by_hand() -> None:
    # Good 0.9, 0.4; bad 0.5, 0.4, 0.1: pairs won 3 + (0, 0.5, 1) = 4.5 of 6.
    assert auc([0.9, 0.4, 0.5, 0.4, 0.1], [1, 1, 0, 0, 0]) == pytest.approx(4.5 / 6)
    assert auc([0.2, 0.2], [1, 0]) == 0.5
    assert auc([1, 2, 3], [0, 0, 1]) == 1.0
    assert np.isnan(auc([1, 2], [1, 1]))
    assert np.isnan(auc([], []))


def test_auc_with_weights_equals_repeating_the_rows() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 6, 30) / 5, generator.random(30) < 0.5
    weights = generator.integers(0, 4, (300, 30))
    repeated = [auc(np.repeat(scores, row), np.repeat(labels, row)) for row in weights]
    np.testing.assert_allclose(auc(scores, labels, weights), repeated)


def test_auc_within_categories_gains_nothing_from_their_scale() -> None:
    scores, labels = [0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0]
    assert auc(scores, labels) == 1.0
    assert np.isnan(auc_within(scores, labels, ["a", "a", "b", "b"]))  # no category has both labels
    # a: good 0.9 above bad 0.8; b: good 0.1 below bad 0.2; c has no bad.
    assert auc_within([0.9, 0.8, 0.1, 0.2, 0.5], [1, 0, 1, 0, 1], list("aabbc")) == 0.5


def test_pairs_are_made_only_within_a_prompt() -> None:
    # "a": good 0.2 below bad 0.3; "b": good 0.9 and 0.8 above bad 0.8 (one tie).
    result = pairwise_accuracy([0.2, 0.3, 0.9, 0.8, 0.8], [1, 0, 1, 1, 0], ["a", "a", "b", "b", "b"])
    assert result.value == pytest.approx((0 + 1.5) / 3)
    assert result.n == 3
    alone = pairwise_accuracy([0.9, 0.1], [1, 0], ["a", "b"])
    assert np.isnan(alone.value)
    assert alone.n == 0


def test_kappa_by_hand() -> None:
    # 3 of 4 agree; shares of yes 3/4 and 1/2, so 1/2 by chance.
    assert kappa([1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx(0.5)
    assert kappa([1, 0], [1, 0]) == 1.0
    assert np.isnan(kappa([1, 1], [1, 1]))
    assert np.isnan(kappa([], []))


def test_interval_as_dict() -> None:
    assert Interval(0.5, 0.4, 0.6, 7).as_dict() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7}
