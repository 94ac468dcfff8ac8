"""Distances between feature sets against closed forms."""

import itertools

import numpy as np
import pytest

from accord.evaluation.fidelity import Reference, diversity, diversity_by_prompt, frechet_distance, kid

Floats = np.ndarray


def _exact(mean: Floats, root: Floats, n: int = 400) -> Floats:
    """n rows whose sample mean is `mean` and whose sample covariance is root @ root.T, to rounding."""
    rows = np.random.default_rng(0).standard_normal((n, len(mean)))
    rows -= rows.mean(axis=0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return whitened @ root.T + mean


def test_frechet_of_gaussians_with_diagonal_covariances() -> None:
    a = _exact(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 2.0, 3.0]))
    b = _exact(np.array([0.0, 2.0, 5.0]), np.diag([2.0, 2.0, 1.0]))
    # |m|^2 = 1 + 0 + 4; each axis adds the square of the difference in standard deviation: 1 + 0 + 4.
    assert frechet_distance(a, b) == pytest.approx(10.0, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(10.0, rel=1e-6)


def test_frechet_where_the_covariances_do_not_commute() -> None:
    s1, s2 = np.array([[2.0, 1.0], [1.0, 2.0]]), np.diag([4.0, 1.0])
    # For 2 x 2: tr((S1 S2)^1/2) = sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2))), here sqrt(10 + 2 sqrt(12)).
    expected = 4.0 + 5.0 - 2.0 * np.sqrt(10.0 + 2.0 * np.sqrt(12.0))
    a, b = (_exact(np.zeros(2), np.linalg.cholesky(s)) for s in (s1, s2))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero_and_of_one_image_undefined() -> None:
    a = _exact(np.zeros(8), np.eye(8))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert np.isnan(frechet_distance(a[:1], a))
    assert np.isnan(frechet_distance(a, a[:0]))


def test_frechet_with_fewer_images_than_features_is_finite() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    assert frechet_distance(rows[:10], rows) > 0.0


def test_frechet_influence_is_the_derivative_by_the_weight_of_an_image() -> None:
    generator = np.random.default_rng(0)
    reference = Reference(generator.standard_normal((80, 3)))
    images = generator.standard_normal((12, 3)) @ generator.standard_normal((3, 3)) + 0.7

    def distance(weights: Floats) -> float:
        mean = weights @ images
        covariance = (
            (images - mean).T @ ((images - mean) * weights[:, None]) * len(images) / (len(images) - 1)
        )
        return reference.frechet_to_gaussian(mean, covariance)

    even, step = np.full(12, 1 / 12), 1e-6
    assert distance(even) == pytest.approx(reference.frechet(images))
    towards = [step * (one - even) for one in np.eye(12)]
    slopes = [(distance(even + way) - distance(even - way)) / (2 * step) for way in towards]
    influence = reference.frechet_influence(images)
    assert influence.mean() == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(influence, slopes, rtol=1e-4, atol=1e-6)


def test_frechet_influence_gives_the_spread_of_the_distance() -> None:
    generator = np.random.default_rng(0)
    reference = Reference(generator.standard_normal((2000, 4)))
    images = generator.standard_normal((300, 4)) * 1.5 + 1.0
    drawn = generator.integers(0, 300, (400, 300))
    resampled = np.array([reference.frechet(images[rows]) for rows in drawn])
    influence = reference.frechet_influence(images)
    first_order = reference.frechet(images) + influence[drawn].mean(axis=1)
    assert np.corrcoef(resampled, first_order)[0, 1] > 0.98
    assert first_order.std() == pytest.approx(resampled.std(), rel=0.1)
    assert np.isnan(reference.frechet_influence(images[:1])).all()
    assert np.isfinite(reference.frechet_influence(images[:3])).all()  # fewer images than features


def test_kid_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((5, 3)), generator.standard_normal((4, 3)) + 0.5

    def kernel(a: Floats, b: Floats) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [
        np.mean([kernel(a[i], a[j]) for i, j in itertools.permutations(range(len(a)), 2)]) for a in (x, y)
    ]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within[0] + within[1] - 2 * across)
    assert np.isnan(kid(x[:1], y))


def test_kid_is_unbiased_at_the_same_distribution_and_positive_at_another() -> None:
    generator = np.random.default_rng(0)
    same = [kid(generator.standard_normal((20, 4)), generator.standard_normal((20, 4))) for _ in range(300)]
    standard_error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * standard_error
    assert min(same) < 0 < max(same)
    moved = [
        kid(generator.standard_normal((20, 4)) + 1.0, generator.standard_normal((20, 4))) for _ in range(50)
    ]
    assert min(moved) > 0.0


def test_reference_gives_what_the_plain_functions_give() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((30, 6)), generator.standard_normal((40, 6))
    reference = Reference(y)
    assert reference.frechet(x) == frechet_distance(x, y)
    assert reference.kid(x) == kid(x, y)
    assert reference.kid(x) == reference.kid(x)


def test_diversity_is_the_mean_distance_within_each_prompt() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [9.0, 9.0], [1.0, 0.0], [7.0, 7.0]])
    prompts = ["b", "b", "a", "alone", "a", "b"]
    distance, names = diversity_by_prompt(features, prompts)
    assert list(names) == ["a", "b"]
    expected_b = (5.0 + np.sqrt(98.0) + 5.0) / 3
    np.testing.assert_allclose(distance, [1.0, expected_b])
    assert diversity(features, prompts).value == pytest.approx((1.0 + expected_b) / 2)
    assert diversity(features, prompts).n == 2


def test_diversity_of_single_images_is_missing() -> None:
    assert diversity(np.zeros((2, 3)), ["a", "b"]).n == 0
    assert diversity(np.zeros((0, 3)), []).n == 0
