"""TextNorm: an image counts by how far its own prompt stands above others."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from accord.errors import ConfigError, PromptError
from accord.prompts import load_grammar
from accord.reward.ensemble import make_head
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.model import RewardModel
from accord.reward.textnorm import TextNormalised, contrast_prompts
from accord.shapes.scene import Scene, random_scene, render
from tests.tiny_clip import tiny_clip_directory

GRAMMAR = load_grammar("shapes")
PROMPTS = ["red star", "two stars", "red star"]


@pytest.fixture(scope="module")
def encoder(session_dir: Path) -> ClipEncoder:
    return ClipEncoder(tiny_clip_directory(session_dir / "clip of textnorm"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def model_of(encoder: ClipEncoder, heads: int = 1, penalty: float = 0.0) -> RewardModel:
    head = make_head(encoder.dim, 8, 1, "concat", heads, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return RewardModel(head, encoder, uncertainty_penalty=penalty)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_score_is_the_share_of_the_own_prompt_in_each_head(
    encoder: ClipEncoder, images: np.ndarray, penalty: float
) -> None:
    model = model_of(encoder, heads=3, penalty=penalty)
    scores = TextNormalised(model, GRAMMAR, temperature=0.3, num_prompts=4, seed=2).score(images, PROMPTS)
    image_BD = encoder.image_features(images)
    for row, text in enumerate(PROMPTS):
        others = [p.text for p in GRAMMAR.perturb(GRAMMAR.parse(text), 3, seed=2)]
        text_ND = encoder.text_features([text, *others])
        with torch.inference_mode():
            reward_EN = model.head(image_BD[row].expand(4, -1), text_ND)
        shares = [math.exp(own[0] / 0.3) / sum(math.exp(r / 0.3) for r in own) for own in reward_EN.tolist()]
        mean = sum(shares) / 3
        std = math.sqrt(sum((share - mean) ** 2 for share in shares) / 2)
        assert float(scores[row]) == pytest.approx(mean - penalty * std, abs=1e-5)
    assert scores[0] != scores[2]


def test_an_image_that_pleases_with_any_prompt_gains_nothing(
    encoder: ClipEncoder, images: np.ndarray
) -> None:
    head = RewardHead(encoder.dim, combine="adapter")
    with torch.no_grad():
        head.scale.fill_(-1.0)  # the prompt plays no part
        head.image_bias.copy_(torch.randn(encoder.dim, generator=torch.Generator().manual_seed(0)))
    model = RewardModel(head, encoder)
    plain = model.score(images, PROMPTS)
    assert plain.std() > 1e-3
    scores = TextNormalised(model, GRAMMAR, temperature=0.1, num_prompts=5).score(images, PROMPTS)
    assert scores.tolist() == pytest.approx([1 / 5] * 3, abs=1e-5)


def test_it_knows_what_a_render_shows() -> None:
    """With the shipped CLIP, which has learned no reward yet."""
    encoder = ClipEncoder("pkg://accord.shapes/weights/clip")
    scorer = TextNormalised(
        RewardModel(RewardHead(encoder.dim, combine="adapter"), encoder), GRAMMAR, temperature=0.05
    )
    rng = np.random.default_rng(0)
    scenes: list[Scene] = [random_scene(rng) for _ in range(24)]
    right = scorer.score([render(scene) for scene in scenes], [f"{s.colour} {s.object}" for s in scenes])
    wrong = scorer.score(
        [render(scene) for scene in scenes],
        [f"{'red' if s.colour != 'red' else 'blue'} {s.object}" for s in scenes],
    )
    assert (right > wrong).all()
    assert right.mean() > 0.4 > 4 * wrong.mean()


def test_scores_do_not_depend_on_the_company(
    encoder: ClipEncoder, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TextNormalised(model_of(encoder), GRAMMAR).score(images, PROMPTS)
    monkeypatch.setattr("accord.reward.textnorm._PAIRS", 1)
    torch.testing.assert_close(TextNormalised(model_of(encoder), GRAMMAR).score(images, PROMPTS), whole)
    assert TextNormalised(model_of(encoder), GRAMMAR).score(images[:0], []).shape == (0,)


def test_a_prompt_has_as_many_contrasts_as_there_are() -> None:
    prompt = GRAMMAR.parse("red star")
    few = contrast_prompts(GRAMMAR, prompt, 3)
    all_of_them = contrast_prompts(GRAMMAR, prompt, 10_000)
    assert len(few) == 3
    assert few == all_of_them[:3]
    assert prompt.text not in all_of_them
    with pytest.raises(PromptError, match="there are"):
        GRAMMAR.perturb(prompt, len(all_of_them) + 1, seed=0)


def test_what_cannot_be_normalised_is_refused(encoder: ClipEncoder, images: np.ndarray) -> None:
    with pytest.raises(PromptError, match="mauve"):
        TextNormalised(model_of(encoder), GRAMMAR).score(images[:1], ["mauve star"])
    for options in ({"temperature": 0.0}, {"num_prompts": 1}):
        with pytest.raises(ConfigError, match="expected a temperature above 0 and at least 2 prompts"):
            TextNormalised(model_of(encoder), GRAMMAR, **options)  # type: ignore[arg-type]
