"""What a way of aligning reports of itself (checkpoints and their cost), how its models are measured, and the
table of success against cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from accord.config import Config, load_yaml
from accord.errors import ConfigError
from accord.evaluation.fidelity import Reference
from accord.evaluation.guidance import choose_guidance, frontier_table
from accord.evaluation.plan import CHOICE, TEST, evaluation_rows
from accord.evaluation.statistics import Bootstrap, Interval
from accord.evaluation.study import seeds_interval
from accord.prompts import load_grammar
from accord.recipe import Recipe
from benchmarks.tables import table
from ray_jobs import evaluate, inputs
from ray_jobs.generation import Row, Source, generate

BASE = "base"
BATCH_SIZE = 64


class Checkpoint(Config):
    """A model on the way, and what it had cost by then."""

    model: Path
    """A directory in diffusers' format with weights in safetensors; relative to the result's file."""
    samples: NonNegativeInt
    """Images drawn from the model in all, those for people to judge among them."""
    cpu_s: NonNegativeFloat
    """CPU time of all processes in seconds, with their start; data that was there before costs nothing."""


class Result(Config):
    """result.json: one run, of one seed, of one way of aligning."""

    arm: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    configuration: str = ""
    """What was varied in tuning, for people."""
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(min_length=1)]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results with their models' absolute paths.

    Raises ConfigError: a file that is none, or two of one arm, configuration and seed.
    """
    results: list[Result] = []
    for path in paths:
        result = load_yaml(Result, path)  # JSON is YAML
        known = {(other.arm, other.configuration, other.seed) for other in results}
        if (result.arm, result.configuration, result.seed) in known:
            raise ConfigError(
                f"{path}: {result.arm}, seed {result.seed} was given already; give each run once"
            )
        found = [
            c.model_copy(update={"model": (path.parent / c.model).resolve()}) for c in result.checkpoints
        ]
        results.append(result.model_copy(update={"checkpoints": tuple(found)}))
    return results


@dataclass(frozen=True)
class Measured:
    """A model at its best guidance scale."""

    guidance: float
    success: float
    images: int


def measure_models(
    recipe: Recipe, models: Mapping[str, Path], directory: Path, *, tuning: bool
) -> dict[str, Measured]:
    """Success of each model, all on the same prompts and seeds, which follow from recipe.seed.

    `tuning`: by the raters' majority, on prompts that no claim is made on; the best scale is that of the same
    images. Otherwise by the evaluator, on reserved prompts, at the scale that is best on other (reserved)
    prompts. Images are kept in `directory`, and not drawn again.
    """
    reserved = "none" if tuning else "only"
    settings = recipe.evaluate.model_copy(update={"reserved_prompts": reserved})
    planned = evaluation_rows(settings, load_grammar(recipe.grammar), recipe.seed)
    first = planned[planned["group"] == (TEST if tuning else CHOICE)]
    tables = [
        first.assign(model=name, guidance=scale) for name in models for scale in settings.guidance_scales
    ]
    tried = _draw(recipe, models, pd.concat(tables, ignore_index=True), directory)
    if tuning:
        success = tried.assign(success=_majority(recipe, directory, tried)).groupby(["model", "guidance"])
        rates = success["success"].mean()
        best = {name: max(settings.guidance_scales, key=lambda scale: rates[name, scale]) for name in models}
        return {name: Measured(scale, float(rates[name, scale]), len(first)) for name, scale in best.items()}
    measured, features_ND = evaluate.measure(recipe, directory, tried)
    points = frontier_table(
        measured, features_ND, Reference(features_ND[:0]), bootstrap=Bootstrap(recipe.seed, resamples=1)
    )
    chosen = choose_guidance(points)
    claims = planned[planned["group"] == TEST]
    tables = [claims.assign(model=name, guidance=chosen[name]) for name in models]
    tested = _draw(recipe, models, pd.concat(tables, ignore_index=True), directory)
    rates = evaluate.measure(recipe, directory, tested)[0].groupby("model")["success"].mean()
    return {name: Measured(chosen[name], float(rates[name]), len(claims)) for name in models}


def _draw(recipe: Recipe, models: Mapping[str, Path], rows: pd.DataFrame, directory: Path) -> pd.DataFrame:
    """The rows with `image`, the digest of each."""
    drawn = generate(
        [Row(r.model, r.prompt, r.seed, r.guidance) for r in inputs.records(rows)],
        models={
            name: Source(path, inputs.digest_of(path, "diffusion_model")) for name, path in models.items()
        },
        sampler=recipe.evaluate.sampler,
        batch_size=recipe.evaluate.batch_size,
        images=directory / inputs.IMAGES,
        work=directory / "work",
        config=recipe.ray,
        title=f"Images of seed {recipe.seed}",
    )
    return rows.assign(image=drawn["image"])


def _majority(recipe: Recipe, directory: Path, rows: pd.DataFrame) -> list[bool]:
    """Whether more of all raters find an image good than bad."""
    panel, grammar = inputs.make_panel(recipe, "tuning"), load_grammar(recipe.grammar)
    folder, verdicts = inputs.image_folder(directory), []
    for part in inputs.batches(list(inputs.records(rows)), BATCH_SIZE):
        prompts = [grammar.parse(row.prompt) for row in part]
        keys = [f"tuning {row.image} {row.prompt}" for row in part]
        images = [folder.load(row.image) for row in part]
        for votes in panel.judge(images, prompts, keys, len(panel.raters)):
            good, bad = (sum(v.verdict == verdict for v in votes) for verdict in ("good", "bad"))
            verdicts.append(good > bad)
    return verdicts


def rows_of(
    results: Sequence[Result], measured: Mapping[int, Mapping[str, Measured]]
) -> list[dict[str, Any]]:
    """One row a run and checkpoint: arm, checkpoint (from 0), seed, samples, cpu_min, guidance, success, gain
    (in points over the base of that seed).

    `measured`: by seed, the models by `name_of`, and "base".
    """
    rows = []
    for result in results:
        base = measured[result.seed][BASE]
        for number, checkpoint in enumerate(result.checkpoints):
            found = measured[result.seed][name_of(result, number)]
            rows.append(
                {
                    "arm": result.arm,
                    "configuration": result.configuration,
                    "checkpoint": number,
                    "seed": result.seed,
                    "samples": checkpoint.samples,
                    "cpu_min": checkpoint.cpu_s / 60,
                    "guidance": found.guidance,
                    "success": 100 * found.success,
                    "gain": 100 * (found.success - base.success),
                    "base": 100 * base.success,
                }
            )
    return rows


def name_of(result: Result, number: int) -> str:
    """The name under which a checkpoint of a run is measured."""
    return f"{result.arm} / {result.configuration} / {number}"


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds with 95% intervals from seed to seed; gains are paired with the base of their seed."""
    lines: list[list[object]] = []
    bases = {row["seed"]: row["base"] for row in rows}
    lines.append([BASE, "", len(bases), "0", "0", _interval(list(bases.values())), "", "", ""])
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["configuration"], row["checkpoint"]), []).append(row)
    for (arm, configuration, _), same in groups.items():
        samples, minutes = (float(np.mean([row[key] for row in same])) for key in ("samples", "cpu_min"))
        per_sample = [1000 * row["gain"] / row["samples"] for row in same if row["samples"]]
        per_minute = [row["gain"] / row["cpu_min"] for row in same if row["cpu_min"]]
        lines.append(
            [
                arm,
                configuration,
                len(same),
                f"{samples:,.0f}",
                f"{minutes:.2f}",
                _interval([row["success"] for row in same]),
                _interval([row["gain"] for row in same], sign=True),
                _interval(per_sample, sign=True) if per_sample else "none drawn",
                _interval(per_minute, sign=True) if per_minute else "",
            ]
        )
    headings = ["arm", "configuration", "seeds", "samples", "CPU-minutes", "success, %", "gain, points"]
    return table([*headings, "points per 1,000 samples", "points per CPU-minute"], lines)


def _interval(values: Sequence[float], *, sign: bool = False) -> str:
    found: Interval = seeds_interval(values)
    form = "{:+.1f}" if sign else "{:.1f}"
    text = form.format(found.value)
    if np.isfinite(found.low):
        text += f" ({form.format(found.low)} to {form.format(found.high)})"
    return text.replace("-", "−")
