import math

import numpy as np
import pytest

from accord.errors import FeedbackError
from accord.reward.calibration import Bin, Platt, expected_calibration_error, fit_platt, reliability_bins


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_identity_scaling_changes_nothing() -> None:
    assert Platt()([0.1, 0.5, 0.9]).tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_scaling_is_a_sigmoid_of_the_scaled_logit() -> None:
    # 2 * logit(0.8) - 1 with logit(0.8) = log 4
    assert float(Platt(2.0, -1.0)(0.8)) == pytest.approx(1 / (1 + math.exp(1 - 2 * math.log(4))))


def test_fit_of_two_scores_is_exact() -> None:
    # Two distinct scores and two parameters: the fit meets the mean target of each exactly. With 30 good and
    # 30 bad labels the targets are 31/32 and 1/32.
    scores = [0.2] * 30 + [0.6] * 30
    labels = [1.0] * 10 + [0.0] * 20 + [1.0] * 20 + [0.0] * 10
    low, high = (10 * 31 / 32 + 20 / 32) / 30, (20 * 31 / 32 + 10 / 32) / 30
    slope = (logit(high) - logit(low)) / (logit(0.6) - logit(0.2))
    platt = fit_platt(scores, labels)
    assert platt.slope == pytest.approx(slope)
    assert platt.intercept == pytest.approx(logit(low) - slope * logit(0.2))
    assert platt([0.2, 0.6]).tolist() == pytest.approx([low, high])


def test_fit_lowers_the_calibration_error_of_overconfident_scores() -> None:
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.05, 0.95, 4000)
    labels = (generator.random(4000) < truth).astype(float)
    scores = Platt(3.0, 0.7)(truth)  # overconfident, and too high
    platt = fit_platt(scores, labels)
    before, after = (
        expected_calibration_error(scores, labels),
        expected_calibration_error(platt(scores), labels),
    )
    assert before > 0.1
    assert after < 0.03
    assert platt.slope == pytest.approx(1 / 3, rel=0.1)


def test_fit_of_separable_labels_and_extreme_scores_is_finite() -> None:
    platt = fit_platt([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    assert math.isfinite(platt.slope)
    assert platt([0.0, 1.0]).tolist() == pytest.approx([0.25, 0.75], abs=1e-3)  # Platt's targets, 1/4 and 3/4


def test_fit_never_reverses_a_ranking() -> None:
    platt = fit_platt([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0])
    assert platt.slope == 0.0
    assert float(platt(0.3)) == pytest.approx(0.5)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_fit_needs_both_labels(label: float) -> None:
    with pytest.raises(FeedbackError, match="both kinds are needed"):
        fit_platt([0.1, 0.9], [label, label])


def test_bins_and_error_by_hand() -> None:
    scores, labels = [0.05, 0.15, 0.55, 0.65, 1.0], [0, 1, 1, 1, 0]
    # Two bins: [0, 0.5) mean score 0.1, good 1/2; [0.5, 1] mean score 2.2/3, good 2/3
    low, high = reliability_bins(scores, labels, bins=2)
    assert (low.low, low.high, low.count, low.good_share) == (0.0, 0.5, 2, 0.5)
    assert low.mean_score == pytest.approx(0.1)
    assert (high.count, high.mean_score, high.good_share) == (3, pytest.approx(2.2 / 3), pytest.approx(2 / 3))
    # (2 * |0.1 - 0.5| + 3 * |2.2/3 - 2/3|) / 5 = (0.8 + 0.2) / 5
    assert expected_calibration_error(scores, labels, bins=2) == pytest.approx(0.2)


def test_edges_belong_to_the_upper_bin_and_empty_bins_are_left_out() -> None:
    assert reliability_bins([0.5, 0.5], [1, 0], bins=4) == [Bin(0.5, 0.75, 2, 0.5, 0.5)]


def test_error_of_nothing_is_not_a_number() -> None:
    assert math.isnan(expected_calibration_error([], []))
