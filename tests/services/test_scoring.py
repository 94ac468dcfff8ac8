"""Scoring several requests together, without Ray."""

from __future__ import annotations

import numpy as np
import pytest

from accord.prompts import load_grammar
from accord.reward.model import open_reward
from services.reward.messages import ScoreRequest
from services.reward.scoring import Perturbations, ServedReward, score_all, score_each

CLIP = "pkg://accord.shapes/weights/clip"


@pytest.fixture(scope="module")
def perturbations() -> Perturbations:
    return Perturbations(load_grammar("shapes"), 10)


def test_perturbations_are_of_the_grammar_and_say_something_else(perturbations: Perturbations) -> None:
    others = perturbations.of("two red stars")
    assert len(others) == 9
    assert "two red stars" not in others
    grammar = load_grammar("shapes")
    assert all(grammar.parse(text) for text in others)
    assert perturbations.of("Two  red stars") == others
    assert perturbations.of("a portrait of a dog") == ()


def test_requests_scored_together_get_what_they_would_alone(perturbations: Perturbations) -> None:
    model = open_reward(CLIP)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    first = ScoreRequest(model.digest, images[:2], ["two red stars", "a dog"], probability=True)
    second = ScoreRequest(model.digest, images[2:], ["blue circle"])
    served = ServedReward(model)
    together = score_all([(served, first), (served, second)], perturbations)
    alone = [score_all([(ServedReward(model), request)], perturbations)[0] for request in (first, second)]
    for one, other in zip(together, alone, strict=True):
        assert one.rewards == pytest.approx(other.rewards, abs=1e-5)
        assert one.similarities == pytest.approx(other.similarities, abs=1e-5)
    assert together[0].rewards == pytest.approx(
        model.score(images[:2], ["two red stars", "a dog"]).tolist(), abs=1e-5
    )
    known, unknown = together[0].probabilities
    assert known is not None
    assert 0 < known < 1
    assert unknown is None
    assert together[1].probabilities == [None]


def test_prompts_that_were_asked_about_before_are_not_encoded_again(perturbations: Perturbations) -> None:
    served = ServedReward(open_reward(CLIP))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    prompts = ["two red stars", "blue circle", "two red stars"]
    request = ScoreRequest(served.model.digest, images, prompts, probability=True)
    (first,) = score_all([(served, request)], perturbations)
    encoded: list[int] = []
    encode = served.model.encoder.text_features
    served.model.encoder.text_features = lambda texts: encoded.append(len(texts)) or encode(texts)  # type: ignore[method-assign]
    (again,) = score_all([(served, request)], perturbations)
    assert again == first
    assert sum(encoded) == 0
    for index in range(3):  # what is scored together is scored as alone
        one = ScoreRequest(served.model.digest, images[index : index + 1], prompts[index : index + 1], True)
        (alone,) = score_all([(served, one)], perturbations)
        assert alone.probabilities == pytest.approx([first.probabilities[index]], abs=1e-5)


def test_a_request_that_cannot_be_scored_takes_no_other_with_it(perturbations: Perturbations) -> None:
    model = open_reward(CLIP)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    good = ScoreRequest(model.digest, images[:2], ["two red stars", "a dog"])
    broken = ScoreRequest(model.digest, [images[2][..., 0]], ["blue circle"])  # no colours
    served = ServedReward(model)
    items = [(served, good), (served, broken), (served, good)]
    with pytest.raises(Exception):  # noqa: B017 - whatever it is that CLIP says
        score_all(items, perturbations)
    first, second, third = score_each(items, perturbations)
    assert first is not None
    assert first.rewards == score_all([(served, good)], perturbations)[0].rewards
    assert second is None
    assert third == first
