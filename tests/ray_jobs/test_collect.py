"""Collecting survives a kill at any moment: no image twice, none missing, the same as never interrupted."""

from pathlib import Path

import pytest

from accord.recipe import RayConfig, load_recipe
from ray_jobs import collect
from tests.ray_jobs.processes import start_and_kill

OVERRIDES = ["collect.batch_size=1"]


def test_the_plan_is_seeded_and_grows_without_changing(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    plan = collect.plan(recipe)
    assert plan["part"].value_counts().to_dict() == {"labelled": 16, "unlabelled": 4}
    assert set(plan["split"]) == {"seen"}
    assert not plan.duplicated(["prompt", "seed"]).any()
    more = collect.plan(load_recipe(recipe_path, ["collect.labelled.images_per_prompt.colour=6"]))
    assert set(map(tuple, plan.to_numpy())) < set(map(tuple, more.to_numpy()))
    other = collect.plan(load_recipe(recipe_path, ["seed=2"]))
    assert set(other["seed"]).isdisjoint(plan["seed"])


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resumed_after_a_kill_equals_uninterrupted(
    tmp_path: Path, recipe_path: Path, root: Path, ray_cluster: RayConfig
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = ["--recipe", str(recipe_path), "--run-dir", str(killed)]
    options += [part for override in OVERRIDES for part in ("--set", override)]
    batches = killed / "work" / "candidates"  # 20 in all: the kill comes long before the last
    start_and_kill("collect", options, root, lambda: bool(list(batches.glob("*.parquet"))))
    assert not (killed / "candidates").exists()

    recipe = load_recipe(recipe_path, OVERRIDES)
    resumed = collect.run(recipe, killed)
    without_ray = load_recipe(recipe_path, [*OVERRIDES, "ray.local=true"])
    assert resumed.digest == collect.run(without_ray, whole).digest
    index = collect.load_index(killed)
    assert len(index) == 20
    assert not index.duplicated(["prompt", "seed"]).any()
    assert {path.stem for path in (killed / "images").rglob("*.png")} == set(index["image"])
