"""Compare base, control and aligned model: over guidance scales, splits and categories, by evaluator, reward
and raters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from accord.artifacts import Manifest, load_tensors, read_manifest, save_tensors
from accord.errors import ConfigError
from accord.evaluation.fidelity import Reference
from accord.evaluation.guidance import choose_guidance, frontier_table
from accord.evaluation.plan import BEST_OF, CHOICE, TEST, evaluation_rows
from accord.evaluation.protocols import QUESTIONS, KnowsTheTruth
from accord.evaluation.statistics import Bootstrap
from accord.feedback.aggregate import find_aggregation
from accord.images import decode_image
from accord.prompts import Grammar, load_grammar
from accord.recipe import Recipe
from ray_jobs import _cli, cluster, inputs, latency, second_reward, sources
from ray_jobs.finetune import has_control
from ray_jobs.generation import Row, Source, generate
from ray_jobs.judge import judgement_key
from ray_jobs.progress import bar
from ray_jobs.score import rewards_config, rewards_of, score_images
from ray_jobs.stages import Stage, is_done, required, stage_writer, timed

KIND = "evaluation"
MEASUREMENTS, VOTES, REWARD_ROWS, FEATURES = (
    "measurements.parquet",
    "votes.parquet",
    "reward_rows.parquet",
    "features.safetensors",
)
BATCH_SIZE = 128
SCORES = ("reward", "reward_no_auxiliary", "clip")


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """evaluation/: measurements.parquet (one row an image), features.safetensors, votes.parquet,
    reward_rows.parquet.
    """
    models = _models(recipe, run_dir)
    rewards = {name: required(run_dir, name).digest for name in ("reward", "reward_no_auxiliary")}
    if recipe.rewards:  # they are normalised as the candidates were
        rewards["scores"] = required(run_dir, "scores").digest
    if recipe.reference is None:
        raise ConfigError("evaluate needs real images to compare with, but the recipe's reference is null")
    reference = sources.run(recipe, run_dir, "reference")
    # Which one is a matter of the report, unless another model is to be asked.
    config = recipe.evaluate.model_dump(mode="json", exclude={"second_reward"})
    second = second_reward.digests(recipe)
    stage = Stage(
        "evaluation",
        KIND,
        {
            "grammar": recipe.grammar,
            "evaluator": recipe.evaluator,
            "panel": recipe.panel,
            "judgements_per_image": recipe.feedback.judgements_per_image,
            "aggregation": recipe.feedback.aggregation,
            **config,
            **rewards_config(recipe),
        },
        recipe.seed,
        {name: model.digest for name, model in models.items()}
        | rewards
        | {"reference": reference.digest}
        | second,
    )
    if not is_done(stage, run_dir):
        with timed(run_dir, "evaluate"):
            rows = _generate_all(recipe, run_dir, models)
            cluster.on_device(recipe.ray, _measure_all, recipe, run_dir, stage, rows)
    wanted = {name: model.digest for name, model in models.items()}
    if not recipe.ray.local and not latency.is_measured(run_dir, wanted):  # no arm of a study is ever served
        with timed(run_dir, "latency"):
            cluster.on_device(recipe.ray, latency.measure, recipe, run_dir, models, guidance_of(run_dir))
    return read_manifest(run_dir / "evaluation")


def load_tables(run_dir: Path) -> dict[str, pd.DataFrame]:
    """The evaluation's tables by file name."""
    names = (MEASUREMENTS, VOTES, REWARD_ROWS)
    return {name: pd.read_parquet(run_dir / "evaluation" / name) for name in names}


def guidance_of(run_dir: Path) -> dict[str, float]:
    """The guidance scale that was chosen for each model."""
    measured = load_tables(run_dir)[MEASUREMENTS]
    test = measured[measured["group"] == TEST]
    return {str(model): float(scale) for model, scale in test.groupby("model")["guidance"].first().items()}


def load_features(run_dir: Path) -> dict[str, NDArray[np.float32]]:
    """features_ND of the measurements ("features") and of the real images ("reference")."""
    tensors = load_tensors(run_dir / "evaluation" / FEATURES)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def prepare_base(recipe: Recipe, run_dir: Path) -> None:
    """Generates the base model's images alone, for evaluations of several runs that share their images."""
    _generate_all(recipe, run_dir, {"base": inputs.base_model(recipe)})


def _models(recipe: Recipe, run_dir: Path) -> dict[str, Source]:
    names = ["control", "aligned"] if has_control(recipe) else ["aligned"]
    tuned = {name: Source(run_dir / name, required(run_dir, name).digest) for name in names}
    return {"base": inputs.base_model(recipe), **tuned}


def _generate_all(recipe: Recipe, run_dir: Path, models: dict[str, Source]) -> pd.DataFrame:
    """All images: first those on which each model's guidance is chosen, then those of the claims at that
    guidance.
    """
    planned = evaluation_rows(recipe.evaluate, load_grammar(recipe.grammar), recipe.seed)
    choice = planned[planned["group"] == CHOICE]
    scales = recipe.evaluate.guidance_scales
    tables = [choice.assign(model=model, guidance=scale) for model in models for scale in scales]
    frontier = _generate(
        recipe, run_dir, models, pd.concat(tables, ignore_index=True), "Generating over guidance"
    )
    guidance = _choose(recipe, run_dir, frontier)
    claims = []
    compared = {TEST: list(models), BEST_OF: [name for name in models if name != "control"]}
    for group, names in compared.items():
        rows = planned[planned["group"] == group]
        claims += [rows.assign(model=model, guidance=guidance[model]) for model in names]
    test = _generate(recipe, run_dir, models, pd.concat(claims, ignore_index=True), "Generating for the test")
    return pd.concat([frontier, test], ignore_index=True)


def _generate(
    recipe: Recipe, run_dir: Path, models: dict[str, Source], table: pd.DataFrame, title: str
) -> pd.DataFrame:
    images = generate(
        [Row(r.model, r.prompt, r.seed, r.guidance) for r in inputs.records(table)],
        models=models,
        sampler=recipe.evaluate.sampler,
        batch_size=recipe.evaluate.batch_size,
        images=run_dir / inputs.IMAGES,
        work=run_dir / "work" / "evaluation",
        config=recipe.ray,
        title=title,
    )
    return table.assign(image=images["image"])


def _choose(recipe: Recipe, run_dir: Path, frontier: pd.DataFrame) -> dict[str, float]:
    measured, features_ND = measure(recipe, run_dir, frontier)
    points = frontier_table(
        measured, features_ND, Reference(features_ND[:0]), bootstrap=Bootstrap(recipe.seed, resamples=1)
    )
    return choose_guidance(points)


def measure(recipe: Recipe, run_dir: Path, rows: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.float32]]:
    """The rows with `success` and `readable` by the evaluator, and its features_ND."""
    evaluator, grammar = inputs.make_evaluator(recipe), load_grammar(recipe.grammar)
    folder = inputs.image_folder(run_dir)
    success, readable, features = [], [], []
    with bar("Measuring images", len(rows), "images") as progress:
        for start in range(0, len(rows), BATCH_SIZE):
            part = rows.iloc[start : start + BATCH_SIZE]
            found = evaluator.measure(
                inputs.load_images(folder, list(part["image"])),
                [grammar.parse(text) for text in part["prompt"]],
            )
            success.append(np.asarray(found.success_B, dtype=bool))
            readable.append(np.asarray(found.readable_B, dtype=bool))
            features.append(np.asarray(found.features_BD, dtype=np.float32))
            progress.update(start + len(part))
    measured = rows.assign(success=np.concatenate(success), readable=np.concatenate(readable))
    return measured, np.concatenate(features)


def _measure_all(recipe: Recipe, run_dir: Path, stage: Stage, rows: pd.DataFrame) -> None:
    import torch

    measured, features_ND = measure(recipe, run_dir, rows)
    claims = measured["group"] != CHOICE
    scores = score_images(recipe, run_dir, ["reward", "reward_no_auxiliary"], measured[claims])
    for name in SCORES:
        measured[name] = np.nan
        measured.loc[claims, name] = scores[name]
    best_of = measured["group"] == BEST_OF
    if recipe.rewards and best_of.any():  # what the model is tuned for is what ranks its images
        measured.loc[best_of, "reward"] = rewards_of(recipe, run_dir, measured[best_of])
    if second_reward.digests(recipe):
        measured["second_reward"] = np.nan
        asked = second_reward.score(recipe, measured[claims], inputs.image_folder(run_dir))
        measured.loc[claims, "second_reward"] = asked
    grammar = load_grammar(recipe.grammar)
    measured["fits"], measured["truth"] = _labels(recipe, run_dir, grammar, measured)
    calibrated = measured[claims].assign(
        **{name: scores[f"{name}_calibrated"] for name in ("reward", "reward_no_auxiliary")}
    )
    votes = _votes(recipe, run_dir, grammar, measured)
    with stage_writer(stage, run_dir) as directory:
        measured.to_parquet(directory / MEASUREMENTS, index=False)
        votes.to_parquet(directory / VOTES, index=False)
        _reward_rows(calibrated).to_parquet(directory / REWARD_ROWS, index=False)
        tensors = {"features": features_ND, "reference": reference_features(recipe, run_dir)}
        save_tensors(directory / FEATURES, {name: torch.from_numpy(array) for name, array in tensors.items()})


def reference_features(recipe: Recipe, run_dir: Path) -> NDArray[np.float32]:
    """The evaluator's features_MD of the held-out real images."""
    evaluator, grammar = inputs.make_evaluator(recipe), load_grammar(recipe.grammar)
    files, _ = sources.read(run_dir, "reference")
    prompt = grammar.all_prompts()[0]  # only features are wanted, and they do not depend on a prompt
    parts = [
        evaluator.measure(np.stack([decode_image(file) for file in part]), [prompt] * len(part)).features_BD
        for part in inputs.batches(files, BATCH_SIZE)
    ]
    return np.concatenate(parts).astype(np.float32)


def _labels(
    recipe: Recipe, run_dir: Path, grammar: Grammar, measured: pd.DataFrame
) -> tuple[pd.Series, pd.Series]:
    """`fits`: whether the raters find that a test image fits its prompt; null on a tie, on other rows, or
    without simulated raters. And `truth`, where the panel knows it.
    """
    fits = pd.Series(pd.NA, index=measured.index, dtype="boolean")
    truth = fits.copy()
    if recipe.panel is None:
        return fits, truth
    panel, aggregate = inputs.make_panel(recipe, "evaluate"), find_aggregation(recipe.feedback.aggregation)
    folder = inputs.image_folder(run_dir)
    rows = list(inputs.records(measured[measured["group"] == TEST]))
    votes: dict[Hashable, list[tuple[str, str]]] = {}
    with bar("Judging test images", len(rows), "images") as progress:
        done = 0
        for part in inputs.batches(rows, BATCH_SIZE):
            images = [folder.load(r.image) for r in part]
            asked = [grammar.parse(r.prompt) for r in part]
            keys = [judgement_key(recipe, r.image, r.prompt) for r in part]
            judged = panel.judge(images, asked, keys, recipe.feedback.judgements_per_image)
            if isinstance(panel, KnowsTheTruth):
                truth[[row.Index for row in part]] = panel.truth(images, asked)
            for row, given in zip(part, judged, strict=True):
                votes[row.Index] = [(vote.rater, vote.verdict) for vote in given]
            done += len(part)
            progress.update(done)
    labels = aggregate(votes, {}).label
    for row in rows:
        label = labels[row.Index]
        fits[row.Index] = pd.NA if label is None else bool(label)
    return fits, truth


def _reward_rows(measured: pd.DataFrame) -> pd.DataFrame:
    """What the rewards are measured on: the base model's test images as the raters judge them. They are on
    prompts of all splits, and nothing was trained on them. The rewards are as calibrated, so that they claim
    to be probabilities.
    """
    rows = measured[(measured["group"] == TEST) & (measured["model"] == "base")]
    labels = {
        name: rows[column].astype("Float64").to_numpy(dtype=float, na_value=np.nan)
        for name, column in (("label", "fits"), ("truth", "truth"))
    }
    return rows.assign(**labels)[["prompt", "category", "split", *labels, *SCORES]]


def _votes(recipe: Recipe, run_dir: Path, grammar: Grammar, measured: pd.DataFrame) -> pd.DataFrame:
    """One row a vote: raters compare the aligned model's set of a test prompt with the base's. Which is shown
    first is decided by the prompt's digest.
    """
    columns = ["question", "prompt", "category", "split", "rater", "vote"]
    if recipe.panel is None:
        return pd.DataFrame(columns=columns)
    panel, folder = inputs.make_panel(recipe, "evaluate"), inputs.image_folder(run_dir)
    test = measured[measured["group"] == TEST]
    prompts = test.drop_duplicates("prompt")
    found: list[dict[str, Any]] = []
    with bar("Comparing sets of images", len(prompts), "prompts") as progress:
        for number, row in enumerate(inputs.records(prompts), start=1):
            sets = {
                model: [
                    folder.load(i)
                    for i in test[(test["model"] == model) & (test["prompt"] == row.prompt)]["image"]
                ]
                for model in ("aligned", "base")
            }
            for question in QUESTIONS:
                key = hashlib.sha256(f"{recipe.seed} {question} {row.prompt}".encode()).hexdigest()[:32]
                sign = 1 if int(key, 16) % 2 else -1
                first, second = (sets["aligned"], sets["base"])[::sign]
                ballots = panel.compare(question, grammar.parse(row.prompt), first, second, key)
                by_rater = dict(zip(panel.raters, map(int, ballots), strict=True))
                for rater in _raters(recipe, panel):
                    values = (question, row.prompt, row.category, row.split, rater, sign * by_rater[rater])
                    found.append(dict(zip(columns, values, strict=True)))
            progress.update(number)
    return pd.DataFrame(found, columns=columns)


def _raters(recipe: Recipe, panel: Any) -> list[str]:
    wanted, there = recipe.evaluate.test.raters, list(panel.raters)
    if len(there) < wanted:
        raise ConfigError(
            f"evaluate.test.raters is {wanted}, but the panel has {len(there)} raters; "
            "ask for fewer, or name another panel"
        )
    return there[:wanted]


if __name__ == "__main__":
    _cli.main("evaluate")
