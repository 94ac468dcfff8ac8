"""The plug for scorers, and how several rewards become one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from accord.config import validate
from accord.errors import ConfigError
from accord.reward.model import RewardModel
from accord.reward.remote import RemoteScorer
from accord.reward.scorers import Normaliser, Scorer, combine, open_scorer, scores_of
from accord.reward.settings import RewardTerm
from accord.reward.textnorm import TextNormalised

PICTURES = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (0, 51, 255)]
HERE = "tests.reward.test_scorers"


class Brightness:
    def __init__(self, scale: float, fault: str = "") -> None:
        self.scale, self.fault = scale, fault

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        values = torch.tensor([self.scale * float(image.mean()) / 255 for image in images])
        if self.fault == "short":
            return values[:-1]
        return values / 0 if self.fault == "infinite" else values


def brightness(*, scale: float = 1.0, fault: str = "") -> Brightness:
    return Brightness(scale, fault)


def no_scorer() -> object:
    return object()


def test_a_function_of_ones_own_makes_a_scorer() -> None:
    scorer = open_scorer(f"{HERE}:brightness", {"scale": 2.0})
    assert scores_of(scorer, "brightness", PICTURES, ["a", "b", "c"]).tolist() == pytest.approx([0, 0.4, 2])


def test_all_scorers_of_ours_are_scorers() -> None:
    for kind in (RewardModel, TextNormalised, RemoteScorer):
        assert issubclass(kind, Scorer), kind


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (f"{HERE}:brightnes", {}, "did you mean 'brightness'"),
        (f"{HERE}:brightness", {"size": 1}, "with the options size: got an unexpected keyword argument"),
        (
            f"{HERE}:no_scorer",
            {},
            r"made a object, which cannot score; expected an object with the method score",
        ),
    ],
)
def test_what_is_no_scorer_is_refused(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_scorer(spec, options)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("short", r"'mine' gave \(2,\) for 3 images"), ("infinite", "3 scores of 3 that are not finite")],
)
def test_scores_that_are_none_are_refused(fault: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores_of(Brightness(1.0, fault), "mine", PICTURES, ["a", "b", "c"])


def test_logistic_is_the_sigmoid_of_the_deviation() -> None:
    measured = Normaliser.measured("logistic", np.array([1.0, 3.0]))  # mean 2, standard deviation 1
    assert measured(np.array([2.0, 3.0, 0.0])).tolist() == pytest.approx([0.5, 0.731059, 0.119203], abs=1e-6)
    flat = Normaliser.measured("logistic", np.array([7.0, 7.0]))
    assert flat(np.array([7.0])).tolist() == [0.5]


def test_rank_is_the_share_of_the_measured_images_below() -> None:
    scores = np.random.default_rng(0).lognormal(size=2000)
    measured = Normaliser.measured("rank", scores)
    ranks = (np.argsort(np.argsort(scores)) + 0.5) / len(scores)
    np.testing.assert_allclose(measured(scores), ranks, atol=0.005)
    assert measured(np.array([-5.0, 1e9])).tolist() == [0.0, 1.0]
    assert Normaliser.measured("rank", np.array([3.0] * 5))(np.array([3.0])).tolist() == [0.5]


def test_scores_that_are_no_rewards_must_be_normalised() -> None:
    plain = Normaliser.measured("none", np.array([0.0, 1.0]))
    assert plain(np.array([0.25])).tolist() == [0.25]
    with pytest.raises(
        ConfigError, match=r"'clip' gave scores from -0\.5 to 0\.2; .* normalise: logistic, or rank"
    ):
        plain(np.array([0.2, -0.5]), "clip")


def test_what_was_measured_survives_being_written() -> None:
    measured = Normaliser.measured("rank", np.random.default_rng(0).normal(size=50))
    assert Normaliser.model_validate_json(measured.model_dump_json()) == measured


def test_several_rewards_are_their_weighted_mean() -> None:
    terms = [
        RewardTerm(scorer="reward", weight=3.0),
        RewardTerm(scorer=f"{HERE}:brightness", weight=1.0, normalise="logistic"),
    ]
    scores = {"reward": np.array([0.2, 1.0]), "brightness": np.array([10.0, 30.0])}
    normalisers = {t.title: Normaliser.measured(t.normalise, scores[t.title]) for t in terms}
    expected = [0.75 * 0.2 + 0.25 * 0.268941, 0.75 * 1.0 + 0.25 * 0.731059]
    assert combine(terms, scores, normalisers).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_mistaken_term_is_told_by_its_key() -> None:
    with pytest.raises(ConfigError, match="unknown key 'wieght'; did you mean 'weight'"):
        validate(RewardTerm, {"scorer": "reward", "wieght": 1.0}, "recipe.yaml")
