"""The whole summary on a made-up comparison whose truth is known."""

import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest

from accord.config import validate
from accord.errors import AccordError
from accord.evaluation.config import EvaluateConfig
from accord.evaluation.summary import MEASUREMENT_COLUMNS, MODELS, build_summary, plain, second_reward

SPLITS = ("seen", "unseen_combination", "unseen_object")
CATEGORIES = ("count", "colour", "background", "combination")
CELLS = ("overall", *CATEGORIES)
SCALES = (1.0, 3.0, 7.5)
ESTIMATE = {"value", "low", "high", "n"}
CHANCE = {"base": 0.35, "control": 0.35, "aligned": 0.65}
AT_SCALE = {1.0: 0.5, 3.0: 1.0, 7.5: 0.7}
SETTINGS = {
    "guidance_scales": list(SCALES),
    "bootstrap_resamples": 200,
    "second_reward": "reward_no_auxiliary",
}
CONFIG = validate(EvaluateConfig, SETTINGS, "test")


def images(
    group: str, scales: tuple[float, ...], prompts: int, per_prompt: int, models: Any = MODELS
) -> pd.DataFrame:
    rows = [
        {
            "group": group,
            "model": model,
            "guidance": scale,
            "prompt": f"{group} {split} {category} {prompt}",
            "category": category,
            "split": split,
            "seed": seed,
        }
        for model in models
        for scale in scales
        for split in SPLITS
        for category in CATEGORIES
        for prompt in range(prompts)
        for seed in range(per_prompt)
    ]
    frame = pd.DataFrame(rows)
    generator = np.random.default_rng(len(frame))
    chance = frame["model"].map(CHANCE) * frame["guidance"].map(AT_SCALE)
    luck = np.tile(
        generator.random(len(frame) // len(models)), len(models)
    )  # of a prompt and seed: every model's
    frame["image"] = [f"{i:064x}" for i in range(len(frame))]
    frame["success"] = luck < chance
    frame["readable"] = True
    frame["fits"] = frame["success"]
    noise = generator.normal(0, 0.2, len(frame))
    frame["reward"] = np.clip(0.25 + 0.5 * frame["success"] + noise, 0, 1)
    frame["reward_no_auxiliary"] = frame["reward"]
    frame["clip"] = 0.25
    return frame


def features_of(frame: pd.DataFrame, dimensions: int = 6) -> np.ndarray:
    """Features further from the real ones with guidance: the aligned model's no further than the base's."""
    generator = np.random.default_rng(1)
    features = generator.standard_normal((len(frame), dimensions)) + frame["guidance"].to_numpy()[:, None] / 5
    return features.astype(np.float32)


def comparison() -> dict[str, Any]:
    frame = pd.concat(
        [
            images("choice", SCALES, 3, 4),
            images("test", (3.0,), 5, 4),
            images("best_of", (3.0,), 2, 16, ("base", "aligned")),
        ],
        ignore_index=True,
    )
    questions = [
        (q, s, f"p{i}", r)
        for q in ("alignment", "fidelity")
        for s in SPLITS
        for i in range(12)
        for r in range(9)
    ]
    votes = pd.DataFrame(questions, columns=["question", "split", "prompt", "rater"])
    votes["category"] = "count"
    votes["vote"] = np.where(votes["question"] == "alignment", 1, np.where(votes["rater"] < 7, -1, 1))
    votes.loc[votes["prompt"].isin(["p0", "p1"]), "vote"] = 0
    labelled = frame[frame["group"] == "test"].assign(label=lambda rows: rows["success"].astype(float))
    return {
        "measurements": frame,
        "features_ND": features_of(frame),
        "reference_MD": np.random.default_rng(2).standard_normal((300, 6)).astype(np.float32),
        "votes": votes,
        "feedback": {"count": {"candidates": 3, "judgements": 9, "good": 1 / 3, "bad": 2 / 3, "skip": 0.0}},
        "reward_rows": labelled[
            ["prompt", "category", "split", "label", "reward", "reward_no_auxiliary", "clip"]
        ],
        "digests": {"base": "ab" * 32},
        "seconds": {"collect": 12.3456789},
        "config": CONFIG,
        "seed": 0,
        "feature_name": "a small CNN's last layer",
    }


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    return comparison()


@pytest.fixture(scope="module")
def summary(arguments: dict[str, Any]) -> dict[str, Any]:
    return build_summary(**arguments)


def test_every_required_key_is_there(summary: dict[str, Any]) -> None:
    for model in MODELS:
        for split in SPLITS:
            assert set(summary["success"][model][split]) == set(CELLS)
            assert all(set(cell) == ESTIMATE for cell in summary["success"][model][split].values())
        assert set(summary["fidelity"][model]) == {"frechet", "kid", "n", "reference_n", "features"}
        assert set(summary["diversity"][model]) == set(summary["readable"][model]) == ESTIMATE
        assert summary["guidance"][model] == 3.0
    for question in ("alignment", "fidelity"):
        for split in SPLITS:
            assert set(summary["net_win"][question][split]) == ESTIMATE | {"wins", "losses", "ties"}
    for model in ("base", "aligned"):
        assert list(summary["best_of"][model]) == ["1", "4", "16"]
        assert set(summary["best_of"][model]["16"]) >= ESTIMATE
    for score in ("reward", "reward_no_auxiliary", "clip"):
        for split in SPLITS:
            assert {"auc", "auc_within_category", "pairwise_accuracy", "ece"} <= set(summary[score][split])
    assert len(summary["frontier"]) == len(MODELS) * len(SCALES)
    assert set(summary["change"]["aligned"]) == {"readable", "diversity", "frechet", "second_reward"}
    assert {"feedback", "agreement", "digests", "seconds", "protocol", "verdict"} <= set(summary)


def test_numbers_are_those_of_the_rows(summary: dict[str, Any], arguments: dict[str, Any]) -> None:
    frame = arguments["measurements"]
    test = frame[(frame["group"] == "test") & (frame["split"] == "seen")]
    for model in MODELS:
        rows = test[test["model"] == model]
        assert summary["success"][model]["seen"]["overall"]["value"] == pytest.approx(
            rows["success"].mean(), abs=1e-6
        )
        assert summary["success"][model]["seen"]["overall"]["n"] == 80
        colour = rows.loc[rows["category"] == "colour", "success"]
        assert summary["success"][model]["seen"]["colour"]["value"] == pytest.approx(colour.mean(), abs=1e-6)
    gain = summary["gain"]["aligned"]["seen"]["overall"]
    success = summary["success"]
    difference = success["aligned"]["seen"]["overall"]["value"] - success["base"]["seen"]["overall"]["value"]
    assert gain["value"] == pytest.approx(difference, abs=2e-6)
    assert summary["fidelity"]["base"]["n"] == 240
    apart = summary["fidelity"]["aligned"]["frechet"] - summary["fidelity"]["base"]["frechet"]
    assert summary["change"]["aligned"]["frechet"]["value"] == pytest.approx(apart, abs=2e-6)
    assert (
        summary["change"]["aligned"]["frechet"]["low"]
        < apart
        < summary["change"]["aligned"]["frechet"]["high"]
    )
    assert summary["readable"]["aligned"]["value"] == 1.0
    assert summary["agreement"]["value"] == summary["agreement"]["kappa"] == 1.0
    assert summary["feedback"]["count"]["good"] == 0.333333
    assert summary["seconds"] == {"collect": 12.345679}


def test_the_second_reward_is_the_one_that_was_named(
    summary: dict[str, Any], arguments: dict[str, Any]
) -> None:
    frame = arguments["measurements"]
    test = frame[frame["group"] == "test"].groupby("model")["reward_no_auxiliary"].mean()
    change = summary["change"]["aligned"]["second_reward"]
    assert change["value"] == pytest.approx(test["aligned"] - test["base"], abs=1e-6)
    assert change["low"] < change["value"] < change["high"]
    assert summary["protocol"]["second_reward"] == "reward_no_auxiliary"
    rows = pd.DataFrame({"clip": [0.5], "reward_no_auxiliary": [0.6]})
    assert second_reward(rows, EvaluateConfig()).tolist() == [0.5]
    other = EvaluateConfig(second_reward="runs/other/reward")
    with pytest.raises(AccordError, match="evaluate again"):
        second_reward(rows, other)
    assert second_reward(rows.assign(second_reward=0.7), other).tolist() == [0.7]


def test_votes_are_tallied_by_question_and_split(summary: dict[str, Any]) -> None:
    won, lost = summary["net_win"]["alignment"]["seen"], summary["net_win"]["fidelity"]["unseen_object"]
    assert (won["wins"], won["losses"], won["ties"], won["n"]) == (10, 0, 2, 12)
    assert (lost["wins"], lost["losses"], lost["ties"]) == (0, 10, 2)
    assert won["value"] == pytest.approx(10 / 12, abs=1e-6)
    assert lost["value"] == pytest.approx(-10 / 12, abs=1e-6)


def test_truth_is_found(summary: dict[str, Any]) -> None:
    assert summary["gain"]["aligned"]["all"]["overall"]["low"] > 0.1
    control = summary["gain"]["control"]["all"]["overall"]
    assert control["low"] < 0 < control["high"]
    assert summary["frontier_gain"]["aligned"]["moved"] is True
    assert summary["frontier_gain"]["control"]["moved"] is False
    base = summary["best_of"]["base"]
    assert base["1"]["value"] < base["4"]["value"] < base["16"]["value"] <= base["16"]["perfect"]
    assert summary["reward"]["seen"]["auc_within_category"]["value"] > 0.9
    assert summary["clip"]["seen"]["auc"]["value"] == 0.5
    assert "more often" in summary["verdict"][0]


def test_same_input_same_json_whatever_the_order_of_rows(
    arguments: dict[str, Any], summary: dict[str, Any]
) -> None:
    assert json.dumps(build_summary(**arguments), allow_nan=False) == json.dumps(summary, allow_nan=False)
    order = np.random.default_rng(0).permutation(len(arguments["measurements"]))
    shuffled = {
        **arguments,
        "measurements": arguments["measurements"].iloc[order],
        "features_ND": arguments["features_ND"][order],
    }
    assert build_summary(**shuffled) == summary


def test_all_that_is_optional_may_be_missing(arguments: dict[str, Any]) -> None:
    frame = arguments["measurements"]
    keep = (
        (frame["model"] != "control") & (frame["group"] != "best_of") & (frame["split"] == "seen")
    ).to_numpy()
    kept = frame[keep].assign(fits=None, reward=np.nan, category="count")
    bare = build_summary(
        **{
            **arguments,
            "measurements": kept,
            "features_ND": arguments["features_ND"][keep],
            "votes": None,
            "reward_rows": None,
            "feedback": {},
        }
    )
    json.dumps(bare, allow_nan=False)
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert bare["success"]["control"]["seen"]["overall"] == nothing
    assert bare["success"]["aligned"]["unseen_object"]["count"] == nothing
    assert bare["success"]["aligned"]["seen"]["colour"] == nothing
    assert bare["gain"]["control"]["all"]["overall"] == nothing
    assert bare["net_win"]["fidelity"]["seen"] == {**nothing, "wins": 0, "losses": 0, "ties": 0}
    assert bare["best_of"]["base"]["16"]["value"] is None
    assert bare["reward"]["seen"]["auc"] == nothing
    assert bare["reward"]["seen"]["ece"] is None
    assert bare["fidelity"]["control"]["frechet"] is None
    assert bare["guidance"]["control"] is None
    assert bare["agreement"] == {**nothing, "kappa": None}
    assert bare["frontier_gain"]["control"]["moved"] is None
    assert bare["success"]["aligned"]["seen"]["count"]["n"] == 80


def spoil_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    prompt = frame.loc[frame["group"] == "choice", "prompt"].iloc[0]
    return frame.assign(prompt=frame["prompt"].replace("test seen count 0", prompt))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: frame.drop(columns=["readable", "clip"]), "lack the columns readable, clip"),
        (lambda frame: frame.assign(model=frame["model"].replace("aligned", "tuned")), "model 'tuned'"),
        (lambda frame: frame.assign(split="elsewhere"), "split 'elsewhere'"),
        (lambda frame: frame.assign(success=frame["success"].where(frame.index > 0)), "no success in 1 rows"),
        (lambda frame: frame.assign(seed=0), "an image twice"),
        (lambda frame: frame.iloc[1:], "one each"),
        (spoil_prompt, "must be chosen on other prompts"),
        (
            lambda frame: frame.assign(guidance=frame["guidance"].where(frame["group"] != "test", 2.0)),
            "no test images",
        ),
    ],
)
def test_what_would_make_a_wrong_comparison_is_refused(
    arguments: dict[str, Any], spoil: Any, message: str
) -> None:
    with pytest.raises(AccordError, match=message):
        build_summary(**{**arguments, "measurements": spoil(arguments["measurements"])})


def test_double_votes_and_mixed_best_of_scales_are_refused(arguments: dict[str, Any]) -> None:
    votes = pd.concat([arguments["votes"], arguments["votes"].iloc[:1]])
    with pytest.raises(AccordError, match="voted twice"):
        build_summary(**{**arguments, "votes": votes})
    frame = arguments["measurements"].copy()
    frame.loc[frame.index[-1], "guidance"] = 5.0
    with pytest.raises(AccordError, match="several guidance scales"):
        build_summary(**{**arguments, "measurements": frame})


def test_plain_json() -> None:
    given = {
        1: np.float32("nan"),
        "a": [np.int64(3), np.bool_(True), -0.0, 0.12345678],
        "b": (None, "x", float("inf")),
    }
    assert json.dumps(plain(given)) == '{"1": null, "a": [3, true, 0.0, 0.123457], "b": [null, "x", null]}'


def test_eight_thousand_rows_take_seconds() -> None:
    frame = pd.concat([images("choice", SCALES, 12, 4), images("test", SCALES, 7, 4)], ignore_index=True)
    assert set(MEASUREMENT_COLUMNS) <= set(frame.columns)
    arguments = comparison() | {
        "measurements": frame,
        "features_ND": features_of(frame, 64),
        "reference_MD": np.random.default_rng(2).standard_normal((2000, 64)).astype(np.float32),
        "config": validate(EvaluateConfig, {"bootstrap_resamples": 1000}, "test"),
    }
    start_s = time.process_time()
    build_summary(**arguments)
    assert len(frame) > 8000
    # Of one core, whatever else runs: about one second, more when others crowd the caches.
    assert time.process_time() - start_s < 30
