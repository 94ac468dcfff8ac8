import json
import math

import numpy as np
import pytest

from accord.errors import FeedbackError
from accord.reward.calibration import (
    Bin,
    Platt,
    calibration_report,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    reliability_bins,
)


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


def test_temperature_is_the_overconfidence_and_leaves_the_middle_alone() -> None:
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.05, 0.95, 4000)
    labels = (generator.random(4000) < truth).astype(float)
    scaling = fit_temperature(Platt(3.0)(truth), labels)
    assert scaling.slope == pytest.approx(1 / 3, rel=0.1)
    assert scaling.intercept == 0.0
    assert float(scaling(0.5)) == pytest.approx(0.5)


def test_temperature_is_the_likeliest() -> None:
    scores, labels = [0.2, 0.3, 0.6, 0.7, 0.9], [0, 1, 0, 1, 1]
    slope = fit_temperature(scores, labels).slope

    def loss(a: float) -> float:
        targets = [4 / 5 if label else 1 / 4 for label in labels]
        found = [1 / (1 + math.exp(-a * logit(score))) for score in scores]
        return -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for t, p in zip(targets, found, strict=True))

    assert loss(slope) < min(loss(slope + 0.01), loss(slope - 0.01))


def test_a_temperature_never_reverses_a_ranking_and_needs_both_labels() -> None:
    assert fit_temperature([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == Platt(slope=0.0)
    with pytest.raises(FeedbackError, match="both kinds are needed"):
        fit_temperature([0.1, 0.9], [1, 1])


def test_the_report_measures_each_half_by_what_the_other_fitted() -> None:
    # Good and bad images in turn: the first, third ... of each kind are one half. There scores are true; in
    # the other half they are all the other way round, so that what the first half teaches fails there.
    scores = [0.8, 0.2, 0.2, 0.8] * 20
    labels = [1.0, 0.0, 1.0, 0.0] * 20
    report = calibration_report(scores, labels, "platt")
    assert report["images"] == 80
    assert report["ece"] == pytest.approx(0.3)  # at 0.2 and at 0.8 one half is good
    assert report["slope"] == pytest.approx(0.0, abs=1e-9)  # both halves together say nothing
    # The true half teaches 21/22 and 1/22, Platt's targets, and the other half is wrong by that. Of the
    # other half is learned that nothing is known, 1/2, which is true of the true half.
    assert report["ece_calibrated"] == pytest.approx((21 / 22 + 0) / 2)
    assert sum(found["count"] for found in report["reliability_calibrated"]) == 80
    assert json.loads(json.dumps(report)) == report


def test_a_report_on_too_few_images_is_of_the_scores_alone() -> None:
    report = calibration_report([0.1, 0.9, 0.8], [0, 1, 1], "temperature")
    assert report["ece_calibrated"] is None
    assert report["method"] == "temperature"
    assert report["ece"] == pytest.approx(0.4 / 3)
