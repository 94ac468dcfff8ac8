"""Write summary.json and report.html of an evaluated run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from accord.artifacts import Manifest, code_version, write_file
from accord.demo import load_served
from accord.evaluation.plan import BEST_OF, TEST
from accord.evaluation.report import BestOfCard, Gallery, PairCard, RankedImage, build_report, results_table
from accord.evaluation.summary import build_summary
from accord.feedback.snapshot import load_snapshot, snapshot_distribution, snapshot_raters
from accord.recipe import Recipe
from ray_jobs import _cli, evaluate, guards, inputs, latency, stages
from ray_jobs.progress import console, say

PAIRS_PER_CELL = 1  # of each split and category
STRIPS = 4
NOTE = (
    "Not picked by hand: the first test prompt of each split and category in the recipe's seeded order, with "
    "its first seed. Both models start from the same noise, each at its own guidance scale."
)


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """summary.json and report.html in the run directory; made anew every time, in seconds."""
    manifest = stages.required(run_dir, "evaluation")
    with stages.timed(run_dir, "report"):
        tables = evaluate.load_tables(run_dir)
        features = evaluate.load_features(run_dir)
        votes = tables[evaluate.VOTES]
        summary = build_summary(
            tables[evaluate.MEASUREMENTS],
            features["features"],
            features["reference"],
            votes=votes if len(votes) else None,
            feedback=snapshot_distribution(load_snapshot(run_dir / "snapshot")),
            reward_rows=tables[evaluate.REWARD_ROWS],
            digests=_digests(recipe, run_dir, manifest),
            seconds=stages.read_seconds(run_dir),
            config=recipe.evaluate,
            seed=recipe.seed,
            raters=snapshot_raters(run_dir / "snapshot"),
            calibration=stages.required(run_dir, "reward").config.get("calibration_report"),
            latency=latency.read(run_dir),
            feature_name=inputs.make_evaluator(recipe).feature_name,
        )
        if recipe.finetune.guards is not None:
            summary["guards"] = guards.summary(run_dir, recipe.finetune.guards)
        stages.write_json(run_dir / "summary.json", summary)
        gallery = make_gallery(tables[evaluate.MEASUREMENTS], run_dir)
        write_file(run_dir / "report.html", build_report(summary, gallery, _run_info(recipe)))
    console.print(results_table(summary))
    say(f"Report:  {run_dir / 'report.html'}\nNumbers: {run_dir / 'summary.json'}")
    return manifest


def make_gallery(measured: pd.DataFrame, run_dir: Path) -> Gallery:
    """Pictures chosen by a rule that does not look at them."""
    folder = inputs.image_folder(run_dir)
    test = measured[measured["group"] == TEST]
    pairs = []
    for _, cell in test.groupby(["split", "category"], sort=False):
        for prompt in cell["prompt"].drop_duplicates()[:PAIRS_PER_CELL]:
            rows = cell[cell["prompt"] == prompt]
            base, aligned = (rows[rows["model"] == model].iloc[0] for model in ("base", "aligned"))
            pairs.append(
                PairCard(
                    prompt=prompt,
                    split=str(base["split"]),
                    seed=int(base["seed"]),
                    base_png=folder.get(base["image"]),
                    aligned_png=folder.get(aligned["image"]),
                    base_reward=float(base["reward"]),
                    aligned_reward=float(aligned["reward"]),
                    base_success=bool(base["success"]),
                    aligned_success=bool(aligned["success"]),
                )
            )
    return Gallery(pairs, _strips(measured, run_dir), NOTE, load_served(run_dir))


def _strips(measured: pd.DataFrame, run_dir: Path) -> list[BestOfCard]:
    folder = inputs.image_folder(run_dir)
    rows = measured[(measured["group"] == BEST_OF) & (measured["model"] == "base")]
    prompts = rows.drop_duplicates("prompt").drop_duplicates("category")["prompt"][:STRIPS]
    cards = []
    for prompt in prompts:
        ranked = rows[rows["prompt"] == prompt].sort_values("reward", ascending=False, kind="stable")
        images = [
            RankedImage(folder.get(r.image), float(r.reward), bool(r.success)) for r in inputs.records(ranked)
        ]
        cards.append(BestOfCard(prompt=prompt, model="base", ranked=images))
    return cards


def _digests(recipe: Recipe, run_dir: Path, evaluation: Manifest) -> dict[str, str]:
    """Of everything that went into the numbers."""
    digests = dict(evaluation.inputs)
    for name in ("candidates", "snapshot", "scores", "pretraining"):
        digests[name] = stages.required(run_dir, name).digest
    return {**digests, "clip": inputs.clip_digest(recipe), "evaluation": evaluation.digest}


def _run_info(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.model_dump(
        mode="json", exclude={"run_dir": True, "feedback": {"url"}, "tracking": {"uri"}, "registry": {"uri"}}
    )
    return {
        "name": recipe.name,
        "recipe": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        "command": "accord loop --recipe RECIPE.yaml",
        "Seed": recipe.seed,
        "Code": code_version(),
    }


if __name__ == "__main__":
    _cli.main("report")
