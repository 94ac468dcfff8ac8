"""What fine-tuning learns from: which captions the reward holds for true, and what is made once only."""

from pathlib import Path

import numpy as np
import pytest
import torch

from accord.errors import PromptError
from accord.images import encode_png
from accord.recipe import Recipe, load_recipe
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.model import RewardModel
from accord.shapes.scene import Scene, random_scene, render
from ray_jobs.finetune_data import _once
from ray_jobs.score import score_captioned


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("recipes/sandbox/full.yaml")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A run whose reward has learned nothing yet: an adapter starts as the similarity of the shipped CLIP."""
    directory = tmp_path_factory.mktemp("run")
    encoder = ClipEncoder(recipe.clip)
    RewardModel(RewardHead(encoder.dim, combine="adapter"), encoder).save(
        directory / "reward", inputs={}, config={}, seed=0
    )
    return directory


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(count)]


def test_only_a_caption_that_beats_its_one_word_changes_keeps_its_reward(
    recipe: Recipe, run_dir: Path
) -> None:
    drawn = scenes(40)
    files = [encode_png(render(scene)) for scene in drawn]
    right = [f"{scene.colour} {scene.object}" for scene in drawn]
    wrong = [f"{'red' if scene.colour != 'red' else 'blue'} {scene.object}" for scene in drawn]
    kept = [
        np.array(score_captioned(recipe, run_dir, files, captions, favourites=True))
        for captions in (right, wrong)
    ]
    assert (kept[0] > 0).mean() >= 0.9, "CLIP names nearly all colours and objects of renders"
    assert (kept[1] > 0).mean() <= 0.1
    plain = np.array(score_captioned(recipe, run_dir, files, right, favourites=False))
    assert (plain > 0).all()
    np.testing.assert_allclose(kept[0][kept[0] > 0], plain[kept[0] > 0], atol=1e-6)


def test_favourites_need_captions_of_the_grammar(recipe: Recipe, run_dir: Path) -> None:
    file = encode_png(render(scenes(1)[0]))
    with pytest.raises(PromptError, match="mauve"):
        score_captioned(recipe, run_dir, [file], ["mauve star"], favourites=True)
    assert len(score_captioned(recipe, run_dir, [file], ["mauve star"], favourites=False)) == 1


def test_what_is_made_from_the_same_is_made_once(tmp_path: Path) -> None:
    made = []

    def make(value: float) -> torch.Tensor:
        made.append(value)
        return torch.full((2,), value)

    first = _once(tmp_path, ["a", "b"], lambda: make(1.0))
    again = _once(tmp_path, ["a", "b"], lambda: make(2.0))
    other = _once(tmp_path, ["ab"], lambda: make(3.0))
    assert made == [1.0, 3.0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
