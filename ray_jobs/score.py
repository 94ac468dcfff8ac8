"""Score all collected images, judged or not, with the reward model, or with the recipe's several rewards.

The reward of an image is what the learned reward model says; or, when the recipe has `rewards`, the weighted
mean of these. How each of them is normalised is measured on the collected images, and kept with the scores:
images of later rounds, and those that best-of-N ranks, are rated by the same measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from accord.artifacts import Manifest, read_manifest
from accord.errors import ConfigError
from accord.images import decode_image
from accord.prompts import load_grammar
from accord.recipe import Recipe
from accord.reward.settings import BUILT_IN_SCORERS, RewardTerm
from ray_jobs import _cli, cluster, collect, inputs
from ray_jobs.learn_reward import feature_cache
from ray_jobs.progress import bar
from ray_jobs.stages import Stage, is_done, required, stage_writer, timed

KIND = "scores"
SCORES, REWARDS = "scores.parquet", "rewards.json"
_BATCH = 64


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """scores/scores.parquet: the rows of the candidates, with `reward`; of an ensemble also its
    `reward_uncertainty`, and of several rewards each one's `score_TITLE`."""
    names = ["candidates", "reward"]
    if any(term.scorer == "reward_no_auxiliary" for term in recipe.rewards):
        names.append("reward_no_auxiliary")
    digests = {name: required(run_dir, name).digest for name in names}
    stage = Stage("scores", KIND, rewards_config(recipe), recipe.seed, digests)
    if not is_done(stage, run_dir):
        with timed(run_dir, "score"):
            cluster.on_device(recipe.ray, _score, recipe, run_dir, stage)
    return read_manifest(run_dir / "scores")


def load_scores(run_dir: Path) -> pd.DataFrame:
    """The candidates with their rewards."""
    return pd.read_parquet(run_dir / "scores" / SCORES)


def rewards_config(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe's several rewards changes a result; empty without any."""
    if not recipe.rewards:
        return {}
    return {"rewards": [term.model_dump(mode="json") for term in recipe.rewards], "grammar": recipe.grammar}


def _score(recipe: Recipe, run_dir: Path, stage: Stage) -> None:
    from accord.reward.scorers import Normaliser, combine

    index = collect.load_index(run_dir)
    if not recipe.rewards:
        rewards = score_images(recipe, run_dir, ["reward"], index)
        kept = {name: rewards[name] for name in ("reward", "reward_uncertainty") if name in rewards}
        with stage_writer(stage, run_dir) as directory:
            index.assign(**kept).to_parquet(directory / SCORES, index=False)
        return
    scores, identities = _term_scores(recipe, run_dir, index)
    normalisers = {
        term.title: Normaliser.measured(term.normalise, scores[term.title]) for term in recipe.rewards
    }
    columns = {f"score_{title}": values for title, values in scores.items()}
    with stage_writer(stage, run_dir) as directory:
        rated = index.assign(**columns, reward=combine(recipe.rewards, scores, normalisers))
        rated.to_parquet(directory / SCORES, index=False)
        content = {
            title: {"normaliser": normaliser.model_dump(mode="json"), "identity": identities.get(title, "")}
            for title, normaliser in normalisers.items()
        }
        (directory / REWARDS).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def rewards_of(recipe: Recipe, run_dir: Path, rows: pd.DataFrame) -> list[float]:
    """The reward of each row's image for its prompt, by the measure of the run's scored candidates.

    Raises ConfigError when another model than then answers to a scorer's name.
    """
    from accord.reward.scorers import Normaliser, combine

    if not recipe.rewards:
        return score_images(recipe, run_dir, ["reward"], rows)["reward"]
    kept = json.loads((run_dir / "scores" / REWARDS).read_text("utf-8"))
    scores, identities = _term_scores(recipe, run_dir, rows)
    for title, identity in identities.items():
        if identity != kept[title]["identity"]:
            raise ConfigError(
                f"the scorer {title!r} is {identity or 'nameless'} now, but the run's images were scored "
                f"by {kept[title]['identity'] or 'a nameless one'}: rewards of both cannot be compared; name "
                "that one in the recipe's options, or score anew with --fresh"
            )
    normalisers = {title: Normaliser.model_validate(kept[title]["normaliser"]) for title in scores}
    return list(map(float, combine(recipe.rewards, scores, normalisers)))


def _term_scores(
    recipe: Recipe, run_dir: Path, rows: pd.DataFrame
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """By the title of each of the recipe's rewards: its scores as they are, and the identity that an outside
    scorer states."""
    from accord.reward.scorers import open_scorer

    learned = [term.scorer for term in recipe.rewards if term.scorer in ("reward", "reward_no_auxiliary")]
    inside = score_images(recipe, run_dir, learned, rows)
    scores, identities = {}, {}
    for term in recipe.rewards:
        if term.scorer == "text_normalised":
            scores[term.title] = _text_normalised(recipe, run_dir, rows, term)
        elif term.scorer in BUILT_IN_SCORERS:
            scores[term.title] = np.array(inside[term.scorer])
        else:
            scorer = open_scorer(term.scorer, term.options)
            try:
                scores[term.title] = _scored_outside(scorer, term, run_dir, rows)
                identities[term.title] = str(getattr(scorer, "identity", ""))
            finally:  # guards score many times in one process
                getattr(scorer, "close", lambda: None)()
    return scores, identities


def _scored_outside(scorer: Any, term: RewardTerm, run_dir: Path, rows: pd.DataFrame) -> np.ndarray[Any, Any]:
    from accord.reward.scorers import scores_of

    folder, parts, done = inputs.image_folder(run_dir), [], 0
    pairs = list(zip(rows["image"], rows["prompt"], strict=True))
    with bar(f"Scoring by {term.title}", len(pairs), "images") as progress:
        for part in inputs.batches(pairs, _BATCH):
            images = [folder.load(image) for image, _ in part]
            parts.append(scores_of(scorer, term.title, images, [prompt for _, prompt in part]))
            done += len(part)
            progress.update(done)
    return np.concatenate(parts) if parts else np.zeros(0)


def _text_normalised(
    recipe: Recipe, run_dir: Path, rows: pd.DataFrame, term: RewardTerm
) -> np.ndarray[Any, Any]:
    from accord.reward.model import RewardModel
    from accord.reward.textnorm import TextNormalised

    cache, encoder = feature_cache(recipe, run_dir)
    image_BD = cache.image_features(list(rows["image"]), inputs.image_folder(run_dir).load)
    model = RewardModel.load(run_dir / "reward", clip=encoder)
    scorer = TextNormalised(model, load_grammar(recipe.grammar), **term.options)
    return np.asarray(scorer.score_features(image_BD, list(rows["prompt"])).cpu().double().numpy())


def score_images(
    recipe: Recipe, run_dir: Path, names: list[str], rows: pd.DataFrame
) -> dict[str, list[float]]:
    """Rewards of the rows' images for their prompts by the run's reward models, the probabilities of "good"
    that calibration makes of them ("NAME_calibrated"), the standard deviations of an ensemble's heads
    ("NAME_uncertainty"), and the cosine of their CLIP features ("clip").
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
        reward_B, uncertainty_B = model.score_and_doubt(image_BD, text_BD)
        scores[name] = reward_B.tolist()
        if model.size > 1:
            scores[f"{name}_uncertainty"] = uncertainty_B.tolist()
        scores[f"{name}_calibrated"] = model.calibrated(reward_B).tolist()
    return scores


def score_captioned(
    recipe: Recipe, run_dir: Path, files: Iterable[bytes], captions: Sequence[str], *, favourites: bool
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
    for part, own in zip(inputs.chunks(files, _BATCH), inputs.batches(captions, _BATCH), strict=True):
        image_BD = encoder.image_features([decode_image(file) for file in part])
        for image_D, caption in zip(image_BD, own, strict=True):
            rows = [place[text] for text in texts[caption]]
            reward_N = model.score_features(image_D.expand(len(rows), -1), text_KD[rows])
            rewards.append(float(reward_N[0]) if reward_N[0] >= reward_N.max() else -1.0)
    return rewards


if __name__ == "__main__":
    _cli.main("score")
