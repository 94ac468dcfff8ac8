"""Best of n: the exact expectation equals going through every subset."""

import itertools

import numpy as np
import pytest

from accord.evaluation.bestof import any_of_n, best_of_interval, best_of_n, rank_weights


def _brute_force(rewards: np.ndarray, success: np.ndarray, n: int) -> float:
    """The mean over all subsets of n of the success of the best, shared between equal best ones."""
    chosen = []
    for subset in itertools.combinations(range(len(rewards)), n):
        rows = np.array(subset)
        best = rewards[rows] == rewards[rows].max()
        chosen.append(success[rows][best].mean())
    return float(np.mean(chosen))


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("levels", [1000, 3])
def test_expectation_equals_all_subsets(n: int, levels: int) -> None:
    generator = np.random.default_rng(n + levels)
    rewards, success = generator.integers(0, levels, 8) / levels, (generator.random(8) < 0.4).astype(float)
    assert best_of_n(rewards, success, n) == pytest.approx(_brute_force(rewards, success, n))


def test_rank_weights_by_hand() -> None:
    # Of the six pairs of four candidates, the best is first in three, second in two, third in one.
    np.testing.assert_allclose(rank_weights(4, 2), [3 / 6, 2 / 6, 1 / 6, 0])
    np.testing.assert_allclose(rank_weights(4, 4), [1, 0, 0, 0])
    assert rank_weights(16, 4).sum() == pytest.approx(1.0)
    assert rank_weights(3, 4).sum() == 0.0


def test_equal_rewards_give_the_mean_whatever_the_order() -> None:
    assert best_of_n([0.5] * 4, [1, 1, 0, 0], 4) == pytest.approx(0.5)
    assert best_of_n([0.5] * 4, [0, 0, 1, 1], 2) == pytest.approx(0.5)


def test_any_of_n_by_hand() -> None:
    assert any_of_n([1, 0, 0, 0], 2) == pytest.approx(1 / 2)  # three of six pairs hold it
    assert any_of_n([1, 1, 1, 0], 2) == 1.0
    assert any_of_n([0, 0], 2) == 0.0
    assert np.isnan(any_of_n([1], 2))


def test_interval_over_prompts() -> None:
    rewards, success = [0.9, 0.1, 0.9, 0.1, 0.3], [1, 0, 0, 1, 1]
    prompts = ["a", "a", "b", "b", "short"]
    one, _ = best_of_interval(rewards, success, prompts, 1)
    assert (one.value, one.n) == (pytest.approx((0.5 + 0.5 + 1.0) / 3), 3)
    two, perfect = best_of_interval(rewards, success, prompts, 2)
    assert (two.value, two.n, perfect) == (0.5, 2, 1.0)
    none, perfect = best_of_interval(rewards, success, prompts, 3)
    assert none.n == 0
    assert np.isnan(none.value)
    assert np.isnan(perfect)
    assert best_of_interval([], [], [], 1)[0].n == 0
