"""Several rewards in a run: one weighted mean, by one measure from the first image to the last."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from accord.artifacts import load_tensors, read_manifest
from accord.errors import ConfigError
from accord.evaluation.plan import BEST_OF, TEST
from accord.recipe import Recipe, load_recipe
from accord.reward.features import ClipEncoder
from accord.reward.model import RewardModel
from ray_jobs import collect, evaluate, finetune, inputs, judge, learn_reward, score
from ray_jobs.generation import Source
from ray_jobs.study import _link_shared
from tests.ray_jobs.world import write_recipe

HERE = "tests.ray_jobs.test_rewards"


CLOSED: list[str] = []


class Redness:
    def __init__(self, identity: str) -> None:
        self.identity = identity

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([float(image[..., 0].mean()) for image in images])

    def close(self) -> None:
        CLOSED.append(self.identity)


def redness(*, identity: str = "one") -> Redness:
    return Redness(identity)


SEVERAL = f"""[
    {{scorer: reward, weight: 2.0}},
    {{scorer: clip, weight: 1.0, normalise: rank, name: likeness}},
    {{scorer: text_normalised, options: {{temperature: 0.5, num_prompts: 4}}}},
    {{scorer: "{HERE}:redness", weight: 1.0, normalise: logistic}},
]"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path) -> Path:
    """The directory of a recipe with a run that has learned an ensemble of heads, in `run`."""
    directory = tmp_path_factory.mktemp("rewards")
    recipe = load_recipe(write_recipe(directory, model, clip), SETTINGS)
    for stage in (collect, judge, learn_reward):
        stage.run(recipe, directory / "run")
    return directory


SETTINGS = ["ray.local=true", "reward.ensemble=3", "reward.calibration=temperature"]


def opened(learned: Path, where: Path, *changes: str) -> tuple[Recipe, Path]:
    """The recipe with changes, and a copy of the run for it."""
    shutil.copytree(learned / "run", where)
    return load_recipe(learned / "recipe.yaml", [*SETTINGS, *changes]), where


def rewards(run_dir: Path) -> pd.DataFrame:
    return score.load_scores(run_dir)


def test_an_ensemble_scores_with_its_doubt_and_knows_its_calibration(learned: Path, tmp_path: Path) -> None:
    recipe, run_dir = opened(learned, tmp_path / "run")
    score.run(recipe, run_dir)
    table = rewards(run_dir)
    assert not any(name.startswith("score_") for name in table)
    encoder = ClipEncoder(recipe.clip)
    model = RewardModel.load(run_dir / "reward", clip=encoder)
    assert model.size == 3
    images = [inputs.image_folder(run_dir).load(digest) for digest in table["image"]]
    image_BD, text_BD = encoder.image_features(images), encoder.text_features(list(table["prompt"]))
    heads_EB = model.head_rewards(image_BD, text_BD)
    np.testing.assert_allclose(table["reward"], heads_EB.mean(0), atol=1e-5)
    np.testing.assert_allclose(table["reward_uncertainty"], heads_EB.std(0), atol=1e-5)
    assert table["reward_uncertainty"].min() > 0
    report = read_manifest(run_dir / "reward").config["calibration_report"]
    assert report is not None
    assert report["method"] == "temperature"
    assert model.calibration is not None
    assert model.calibration.slope == report["slope"]
    assert "Calibration error on" in learn_reward.calibration_line(report)
    assert "none" in learn_reward.calibration_line(None)


def test_several_rewards_are_one_weighted_mean(learned: Path, tmp_path: Path) -> None:
    recipe, run_dir = opened(learned, tmp_path / "run", f"rewards={SEVERAL}")
    score.run(recipe, run_dir)
    table = rewards(run_dir)
    images = [inputs.image_folder(run_dir).load(digest) for digest in table["image"]]
    red = np.array([float(image[..., 0].mean()) for image in images])
    np.testing.assert_allclose(table["score_redness"], red, rtol=1e-5)
    likeness = table["score_likeness"]
    assert likeness.min() < 0 or likeness.max() < 1
    parts = {
        "reward": table["score_reward"],
        "likeness": (likeness.rank() - 0.5) / len(table),
        "text": table["score_text_normalised"],
        "redness": 1 / (1 + np.exp(-(red - red.mean()) / red.std())),
    }
    expected = (2 * parts["reward"] + parts["likeness"] + parts["text"] + parts["redness"]) / 5
    np.testing.assert_allclose(table["reward"], expected, atol=0.02)  # ranks by quantiles
    alone = score.score_images(recipe, run_dir, ["reward"], table)["reward"]
    np.testing.assert_allclose(table["score_reward"], alone, atol=1e-6)
    assert read_manifest(run_dir / "scores").config["rewards"][1]["name"] == "likeness"


def test_later_images_are_rated_by_the_first_ones_measure(learned: Path, tmp_path: Path) -> None:
    recipe, run_dir = opened(learned, tmp_path / "run", f"rewards={SEVERAL}")
    score.run(recipe, run_dir)
    table = rewards(run_dir)
    few = table.sort_values("score_redness").head(3)
    np.testing.assert_allclose(score.rewards_of(recipe, run_dir, few), few["reward"], atol=1e-5)
    plain, other = opened(learned, tmp_path / "other")
    score.run(plain, other)
    assert score.rewards_of(plain, other, few) == score.score_images(plain, other, ["reward"], few)["reward"]


def test_another_model_behind_a_scorers_name_is_refused(learned: Path, tmp_path: Path) -> None:
    recipe, run_dir = opened(learned, tmp_path / "run", f"rewards={SEVERAL}")
    score.run(recipe, run_dir)
    assert json.loads((run_dir / "scores" / score.REWARDS).read_text())["redness"]["identity"] == "one"
    assert CLOSED[-1] == "one", "a connection is not left open"
    moved = SEVERAL.replace('redness"', 'redness", options: {identity: two}')
    changed = load_recipe(learned / "recipe.yaml", [*SETTINGS, f"rewards={moved}"])
    with pytest.raises(ConfigError, match="'redness' is two now, but the run's images were scored by one"):
        score.rewards_of(changed, run_dir, rewards(run_dir).head(1))
    with pytest.raises(ConfigError, match=r"config\.rewards"):  # nor is a finished stage overwritten
        score.run(changed, run_dir)


def test_a_score_that_is_no_reward_is_told_before_anything_is_written(learned: Path, tmp_path: Path) -> None:
    recipe, run_dir = opened(learned, tmp_path / "run", f'rewards=[{{scorer: "{HERE}:redness"}}]')
    with pytest.raises(ConfigError, match=r"expected rewards in \[0, 1\]: give it normalise"):
        score.run(recipe, run_dir)
    assert not (run_dir / "scores").exists()


def test_the_arms_of_a_study_share_no_scores_of_other_rewards(learned: Path, tmp_path: Path) -> None:
    common = load_recipe(learned / "recipe.yaml", SETTINGS)
    other = load_recipe(learned / "recipe.yaml", [*SETTINGS, f"rewards={SEVERAL}"])
    _link_shared(tmp_path / "shared", tmp_path / "same", common, common)
    _link_shared(tmp_path / "shared", tmp_path / "other", other, common)
    assert (tmp_path / "same" / "scores").is_symlink()
    assert (tmp_path / "other" / "reward").is_symlink()
    assert not (tmp_path / "other" / "scores").is_symlink()


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ("[{scorer: reward}, {scorer: reward}]", "rewards has reward more than once: give each a name"),
        ("[{scorer: clip, options: {a: 1}}]", "the scorer clip has no options"),
        ("[{scorer: reward, weight: -1.0}]", "weight"),
    ],
)
def test_rewards_that_cannot_be_are_told_at_once(learned: Path, several: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(learned / "recipe.yaml", [f"rewards={several}"])


def test_what_tunes_the_model_ranks_its_images(learned: Path, tmp_path: Path) -> None:
    """A second round is weighted by all rewards, and best-of-N chooses by them; how well the learned reward
    ranks is still measured on it alone."""
    images = "{prompts: {colour: 1}, images_per_prompt: {colour: 3}}"
    changes = (f"rewards={SEVERAL}", "on_policy.rounds=1", f"on_policy.images={images}", "control=false")
    recipe, run_dir = opened(learned, tmp_path / "run", *changes)
    for stage in (score, finetune, evaluate):
        stage.run(recipe, run_dir)
    directory = run_dir / "work" / "aligned" / "round-2"
    second = Source(directory / "model", read_manifest(directory / "model").digest)
    drawn = collect.generate_part(recipe, run_dir, "round 2", recipe.on_policy.images, second, directory)
    used_N = load_tensors(directory / "data.safetensors")["reward_N"]
    np.testing.assert_allclose(used_N, score.rewards_of(recipe, run_dir, drawn), atol=1e-5)
    measured = evaluate.load_tables(run_dir)[evaluate.MEASUREMENTS]
    ranked, tested = (measured[measured["group"] == group] for group in (BEST_OF, TEST))
    np.testing.assert_allclose(ranked["reward"], score.rewards_of(recipe, run_dir, ranked), atol=1e-5)
    alone = score.score_images(recipe, run_dir, ["reward"], measured)["reward"]
    np.testing.assert_allclose(tested["reward"], np.array(alone)[tested.index], atol=1e-5)
    assert np.abs(ranked["reward"] - np.array(alone)[ranked.index]).max() > 0.01
    with pytest.raises(ConfigError, match=r"config\.rewards"):
        evaluate.run(load_recipe(learned / "recipe.yaml", [*SETTINGS, *changes[1:]]), run_dir)
