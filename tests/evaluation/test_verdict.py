"""The sentences of a report: they say what the numbers say, above all where nothing improved."""

from typing import Any

import pytest

from accord.evaluation.verdict import compute_verdict


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 10}


def gains(value: float, low: float, high: float) -> dict[str, Any]:
    return {"gain": {"aligned": {"all": {"overall": estimate(value, low, high)}}}}


def frontier(frechet: dict[str, Any], guidance: dict[str, Any]) -> dict[str, Any]:
    return {"frontier_gain": {"aligned": {"at_equal_frechet": frechet, "at_equal_guidance": guidance}}}


UP, LEVEL, DOWN = estimate(0.1, 0.05, 0.15), estimate(0.01, -0.05, 0.07), estimate(-0.1, -0.2, -0.05)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ((0.081, 0.02, 0.14), "fits prompts more often than the base: +8.1 points (+2.0 to +14.0)."),
        (
            (0.081, -0.02, 0.18),
            "is not shown to fit prompts more often than the base: +8.1 points (−2.0 to +18.0).",
        ),
        ((-0.1, -0.2, -0.04), "fits prompts less often than the base: −10.0 points (−20.0 to −4.0)."),
    ],
)
def test_headline(gain: tuple[float, float, float], expected: str) -> None:
    assert compute_verdict(gains(*gain)) == [f"The aligned model {expected}"]


def test_headline_names_guidance_and_fidelity() -> None:
    summary = gains(0.1, 0.05, 0.15) | {"guidance": {"base": 3.0, "aligned": 1.5}}
    assert "each at its own best guidance (1.5 and 3): +10.0" in compute_verdict(summary)[0]
    moved = compute_verdict(summary | frontier(UP, UP))[0]
    assert moved.endswith("and more often at equal fidelity too.")
    distilled = compute_verdict(summary | frontier(LEVEL, UP))[0]
    assert distilled.endswith("but not shown to at equal fidelity.")


def test_an_estimate_without_an_interval_proves_nothing() -> None:
    summary = {"gain": {"aligned": {"all": {"overall": estimate(0.5)}}}}
    assert compute_verdict(summary) == [
        "The aligned model is not shown to fit prompts more often than the base: +50.0 points."
    ]


@pytest.mark.parametrize(
    ("frechet", "guidance", "expected"),
    [
        (UP, UP, "Fréchet distance moved"),
        (LEVEL, UP, "merely distilled guidance"),
        (LEVEL, LEVEL, "is not shown to have moved"),
        (DOWN, UP, "moved the wrong way"),
    ],
)
def test_frontier(frechet: dict[str, Any], guidance: dict[str, Any], expected: str) -> None:
    sentence = compute_verdict(frontier(frechet, guidance))[1]
    assert expected in sentence
    assert ("distilled" in sentence) == ("distilled" in expected)


def test_splits_and_categories_that_did_not_improve_are_named() -> None:
    cells = {
        "all": {"overall": UP},
        "seen": {"overall": UP, "count": LEVEL, "colour": UP},
        "unseen_object": {"overall": DOWN},
        "unseen_combination": {"overall": estimate(0.0, None, None), "count": {"value": None}},
    }
    sentence = compute_verdict({"gain": {"aligned": cells}})[1]
    assert sentence == (
        "Of 5 comparisons by split and category, improved: seen prompts +10.0 points (+5.0 to +15.0); "
        "colour on seen prompts +10.0 points (+5.0 to +15.0). "
        "Got worse: unseen objects −10.0 points (−20.0 to −5.0). "
        "No improvement shown: unseen combinations, count on seen prompts."
    )


def test_the_rest_of_the_sentences() -> None:
    summary = {
        **gains(0.1, 0.05, 0.15),
        "net_win": {"alignment": {"seen": UP, "unseen_object": LEVEL}, "fidelity": {"seen": DOWN}},
        "fidelity": {"base": {"frechet": 20.0}, "aligned": {"frechet": 25.5}},
        "diversity": {"base": estimate(4.0)},
        "change": {
            "aligned": {
                "readable": DOWN,
                "diversity": estimate(-0.2, -0.3, -0.1),
                "frechet": estimate(5.5, 1.0, 9.0),
            }
        },
        "best_of": {"base": {"1": estimate(0.3), "16": estimate(0.8)}, "aligned": {"1": estimate(0.5)}},
        "reward_gain": {"clip": {"seen": UP, "unseen_object": LEVEL}, "reward_no_auxiliary": {"seen": DOWN}},
    }
    summary["gain"]["control"] = {"all": {"overall": LEVEL}}
    said = compute_verdict(summary)
    for expected in (
        "The control, fine-tuned without any reward, did not measurably change (+1.0 points (−5.0 to +7.0)).",
        "Asked which set fits the prompt, raters say the aligned model wins on seen prompts, net +10.0 "
        "points (+5.0 to +15.0); is level on unseen objects, net +1.0 points (−5.0 to +7.0).",
        "Asked which set looks better, raters say the aligned model loses on seen prompts, net −10.0 points "
        "(−20.0 to −5.0).",
        "The Fréchet distance to real images rose, which is worse: 20.0 to 25.5, +5.5 (+1.0 to +9.0).",
        "The share of readable images fell: −10.0 points (−20.0 to −5.0).",
        "Diversity within a prompt fell (−5.0%).",
        "Keeping the best of 16 base images by reward beats one image of the aligned model: 80.0% "
        "against 50.0%.",
        "As a ranking of labelled images within categories (AUC), the reward against CLIP similarity is "
        "better on seen prompts +0.100 (+0.050 to +0.150), not shown to be better on unseen objects +0.010 "
        "(−0.050 to +0.070).",
        "As a ranking of labelled images within categories (AUC), the reward against the same reward without "
        "the auxiliary loss is worse on seen prompts −0.100 (−0.200 to −0.050).",
    ):
        assert expected in said


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"gain": None, "best_of": {"base": None}},
        {"gain": {"aligned": {"all": {"overall": {"value": None}}}}},
    ],
)
def test_missing_numbers_make_no_claim(summary: dict[str, Any]) -> None:
    assert compute_verdict(summary) == [
        "Base and aligned model were not measured on the same prompts, so nothing is claimed."
    ]
