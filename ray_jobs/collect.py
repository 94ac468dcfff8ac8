"""Generate the images that are to be judged, and those that only the reward scores (the paper's stage 1)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd

from accord.artifacts import Manifest, read_manifest
from accord.prompts import load_grammar
from accord.recipe import CollectPart, Recipe
from ray_jobs import _cli, inputs
from ray_jobs.generation import Row, Source, generate
from ray_jobs.stages import Stage, is_done, stage_writer, timed

KIND = "candidates"
INDEX = "index.parquet"


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """candidates/index.parquet: one row an image, with `part` "labelled" or "unlabelled"."""
    base = inputs.base_model(recipe)
    stage = Stage(
        "candidates",
        KIND,
        {"grammar": recipe.grammar, **recipe.collect.model_dump(mode="json")},
        recipe.seed,
        {"model": base.digest},
    )
    if not is_done(stage, run_dir):
        with timed(run_dir, "collect"):
            table = plan(recipe)
            images = _generate(
                recipe, run_dir, table, base, run_dir / "work" / "candidates", "Collecting images"
            )
            with stage_writer(stage, run_dir) as directory:
                pd.concat([table, images], axis=1).to_parquet(directory / INDEX, index=False)
    return read_manifest(run_dir / "candidates")


def plan(recipe: Recipe) -> pd.DataFrame:
    """What to generate: part, prompt, category, split, seed. An image's seed follows from the run's seed, its
    part, prompt and number, so that asking for more prompts changes no image.
    """
    tables = [_plan_part(recipe, name, part) for name, part in _parts(recipe).items()]
    return pd.concat(tables, ignore_index=True)


def generate_part(
    recipe: Recipe, run_dir: Path, name: str, part: CollectPart, model: Source, work: Path
) -> pd.DataFrame:
    """Images of a model on prompts of their own: the columns of `plan`, and those of the generated images."""
    table = _plan_part(recipe, name, part)
    return pd.concat([table, _generate(recipe, run_dir, table, model, work, f"Images of {name}")], axis=1)


def _generate(
    recipe: Recipe, run_dir: Path, table: pd.DataFrame, model: Source, work: Path, title: str
) -> pd.DataFrame:
    scale = recipe.collect.sampler.guidance_scale
    return generate(
        [Row("model", r.prompt, r.seed, scale) for r in inputs.records(table)],
        models={"model": model},
        sampler=recipe.collect.sampler,
        batch_size=recipe.collect.batch_size,
        images=run_dir / inputs.IMAGES,
        work=work,
        config=recipe.ray,
        title=title,
    )


def _plan_part(recipe: Recipe, name: str, part: CollectPart) -> pd.DataFrame:
    grammar = load_grammar(recipe.grammar)
    rows = [
        {
            "part": name,
            "prompt": prompt.text,
            "category": str(prompt.category),
            "split": str(prompt.split),
            "seed": _image_seed(recipe.seed, name, prompt.text, number),
        }
        for prompt in grammar.sample(part.plan, _image_seed(recipe.seed, name, "prompts", 0))
        for number in range(part.images_per_prompt[prompt.category])
    ]
    return pd.DataFrame(rows, columns=["part", "prompt", "category", "split", "seed"])


def load_index(run_dir: Path) -> pd.DataFrame:
    """The rows of candidates/index.parquet: those of `plan`, with image (digest), width and height."""
    return pd.read_parquet(run_dir / "candidates" / INDEX)


def _parts(recipe: Recipe) -> dict[str, CollectPart]:
    return {"labelled": recipe.collect.labelled, "unlabelled": recipe.collect.unlabelled}


def _image_seed(seed: int, part: str, prompt: str, number: int) -> int:
    """In [0, 2^31)."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed} {part} {prompt} {number}".encode()).digest()[:4], "big") >> 1
    )


if __name__ == "__main__":
    _cli.main("collect")
