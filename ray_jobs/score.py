"""Score all collected images, judged or not, with the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pandas as pd

from accord.artifacts import Manifest, read_manifest
from accord.images import decode_image
from accord.prompts import load_grammar
from accord.recipe import Recipe
from ray_jobs import _cli, cluster, collect, inputs
from ray_jobs.learn_reward import feature_cache
from ray_jobs.stages import Stage, is_done, required, stage_writer, timed

KIND = "scores"
SCORES = "scores.parquet"
_BATCH = 64


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """scores/scores.parquet: the rows of the candidates, with `reward`."""
    digests = {name: required(run_dir, name).digest for name in ("candidates", "reward")}
    stage = Stage("scores", KIND, {}, recipe.seed, digests)
    if not is_done(stage, run_dir):
        with timed(run_dir, "score"):
            cluster.on_device(recipe.ray, _score, recipe, run_dir, stage)
    return read_manifest(run_dir / "scores")


def load_scores(run_dir: Path) -> pd.DataFrame:
    """The candidates with their rewards."""
    return pd.read_parquet(run_dir / "scores" / SCORES)


def _score(recipe: Recipe, run_dir: Path, stage: Stage) -> None:
    index = collect.load_index(run_dir)
    rewards = score_images(recipe, run_dir, ["reward"], index)
    with stage_writer(stage, run_dir) as directory:
        index.assign(reward=rewards["reward"]).to_parquet(directory / SCORES, index=False)


def score_images(
    recipe: Recipe, run_dir: Path, names: list[str], rows: pd.DataFrame
) -> dict[str, list[float]]:
    """Rewards of the rows' images for their prompts by the run's reward models, the probabilities of "good"
    that calibration makes of them ("NAME_calibrated"), and the cosine of their CLIP features ("clip").
    """
    from accord.reward.features import unique
    from accord.reward.model import RewardModel

    cache, encoder = feature_cache(recipe, run_dir)
    image_BD = cache.image_features(list(rows["image"]), inputs.image_folder(run_dir).load)
    texts = unique(rows["prompt"])
    place = {text: row for row, text in enumerate(texts)}
    text_BD = encoder.text_features(texts).cpu()[[place[prompt] for prompt in rows["prompt"]]]
    scores = {"clip": (image_BD * text_BD).sum(dim=1).tolist()}
    for name in names:
        model = RewardModel.load(run_dir / name, clip=encoder)
        reward_B = model.score_features(image_BD, text_BD)
        scores[name] = reward_B.tolist()
        scores[f"{name}_calibrated"] = model.calibrated(reward_B).tolist()
    return scores


def score_captioned(
    recipe: Recipe, run_dir: Path, files: Sequence[bytes], captions: Sequence[str], *, favourites: bool
) -> list[float]:
    """The reward of each image (a PNG file, which need not be of the run) for its own caption.

    With `favourites` it is -1, below any threshold, where the reward prefers a caption that differs in one
    word.

    Raises PromptError if there are favourites to find and a caption is not of the recipe's grammar.
    """
    from accord.reward.model import RewardModel

    _, encoder = feature_cache(recipe, run_dir)
    model = RewardModel.load(run_dir / "reward", clip=encoder)
    grammar = load_grammar(recipe.grammar)
    texts = {
        caption: [caption, *(p.text for p in grammar.one_word_changes(grammar.parse(caption)))]
        if favourites
        else [caption]
        for caption in dict.fromkeys(captions)
    }
    place = {text: row for row, text in enumerate(dict.fromkeys(chain(*texts.values())))}
    text_KD = encoder.text_features(list(place))
    rewards: list[float] = []
    for part, own in zip(inputs.batches(files, _BATCH), inputs.batches(captions, _BATCH), strict=True):
        image_BD = encoder.image_features([decode_image(file) for file in part])
        for image_D, caption in zip(image_BD, own, strict=True):
            rows = [place[text] for text in texts[caption]]
            reward_N = model.score_features(image_D.expand(len(rows), -1), text_KD[rows])
            rewards.append(float(reward_N[0]) if reward_N[0] >= reward_N.max() else -1.0)
    return rewards


if __name__ == "__main__":
    _cli.main("score")
