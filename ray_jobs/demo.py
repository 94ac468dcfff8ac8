"""All stages of one recipe, in order, and then its models asked for images over gRPC; what is done is kept.

`accord demo --skip-serving` leaves the last part out.
"""

from __future__ import annotations

from pathlib import Path

from accord.artifacts import Manifest
from accord.demo import serve_run
from accord.recipe import Recipe
from ray_jobs import _cli, loop, stages


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """The manifest of the evaluation."""
    return loop.run(recipe, run_dir)


def afterwards(recipe: Recipe, run_dir: Path) -> None:
    """Serves the run's models, in a Ray of their own: that of the loop has been left."""
    with stages.timed(run_dir, "serve"):
        serve_run(recipe, run_dir)


if __name__ == "__main__":
    _cli.main("demo")
