"""All stages of one recipe, in order; what is done already is kept."""

from __future__ import annotations

from pathlib import Path

from accord.artifacts import Manifest
from accord.recipe import Recipe
from ray_jobs import _cli, collect, evaluate, finetune, judge, learn_reward, report, score

STAGES = (collect, judge, learn_reward, score, finetune, evaluate, report)


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """The manifest of the evaluation."""
    for stage in STAGES:
        manifest: Manifest = stage.run(recipe, run_dir)
    return manifest


if __name__ == "__main__":
    _cli.main("loop")
