"""Fine-tuning on what people said themselves: labels, pairs of labelled images, comparisons."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from accord.artifacts import load_tensors, read_manifest
from accord.diffusion.finetune_data import load_data
from accord.errors import ConfigError, FeedbackError
from accord.feedback.comparisons import Compared
from accord.feedback.lineage import affected_by
from accord.feedback.snapshot import load_snapshot
from accord.feedback.store import FeedbackStore
from accord.images import encode_png
from accord.recipe import Recipe, load_recipe
from ray_jobs import collect, finetune, inputs, judge, learn_reward, score
from ray_jobs.preferences import load
from ray_jobs.score import load_scores
from tests.ray_jobs.world import write_recipe

CHANGES = ["ray.local=true", "control=false", "finetune.steps=3", "finetune.log_every=1"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model: Path, clip: Path) -> Path:
    """The directory of a recipe whose run has come to its scores, in `run`."""
    directory = tmp_path_factory.mktemp("preferences")
    recipe = load_recipe(write_recipe(directory, model, clip), CHANGES)
    for stage in (collect, judge, learn_reward, score):
        stage.run(recipe, directory / "run")
    return directory


def started(scored: Path, run_dir: Path, *changes: str) -> Recipe:
    """A copy of that run, and its recipe with further changes."""
    shutil.copytree(scored / "run", run_dir, symlinks=True)
    return load_recipe(scored / "recipe.yaml", [*CHANGES, *changes])


def test_kto_learns_from_the_labels_of_the_snapshot(scored: Path, tmp_path: Path) -> None:
    recipe = started(scored, tmp_path / "run", "finetune.objective=diffusion_kto")
    manifest = finetune.run(recipe, tmp_path / "run")
    snapshot = load_snapshot(tmp_path / "run" / "snapshot")
    good, bad = (int((snapshot["label"] == label).sum()) for label in (1.0, 0.0))
    assert good + bad == 16
    assert manifest.config["preferences"] == {"from": "labels", "good": good, "bad": bad}
    assert manifest.inputs["snapshot"] == read_manifest(tmp_path / "run" / "snapshot").digest
    data = load_data(tmp_path / "run" / "work" / "aligned" / "data.safetensors")
    assert sorted(data.label_N.tolist()) == [-1.0] * bad + [1.0] * good
    assert len(data.latents_NCHW) == 16, "and not those that only the reward has scored"
    affected = affected_by("rater 0", tmp_path / "run").affected
    assert "aligned" in {item.path.name for item in affected}


def test_dpo_without_comparisons_learns_from_pairs_of_good_and_bad_images(
    scored: Path, tmp_path: Path
) -> None:
    recipe = started(scored, tmp_path / "run", "finetune.objective=diffusion_dpo")
    manifest = finetune.run(recipe, tmp_path / "run")
    data = load_tensors(tmp_path / "run" / "work" / "aligned" / "data.safetensors")
    assert manifest.config["preferences"] == {"from": "labels", "pairs": len(data["pair_Q2"])}
    labels = load_snapshot(tmp_path / "run" / "snapshot").set_index(["image", "prompt"])["label"]
    images = load(recipe, tmp_path / "run", load_scores(tmp_path / "run")).images
    keys = list(zip(images["image"], images["prompt"], strict=True))
    for chosen, rejected in data["pair_Q2"].tolist():
        assert keys[chosen][1] == keys[rejected][1]
        assert (labels[keys[chosen]], labels[keys[rejected]]) == (1.0, 0.0)


def test_dpo_prefers_comparisons_those_of_elsewhere_too(scored: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = ("finetune.objective=diffusion_dpo", "feedback.comparisons=[public]", "finetune.beta=0")
    recipe = started(scored, run_dir, *changes)
    for name in ("snapshot", "reward", "reward_no_auxiliary", "scores"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
        (run_dir / "stages" / f"{name}.json").unlink(missing_ok=True)
    shutil.rmtree(run_dir / "train")
    rng = np.random.default_rng(0)
    folder = inputs.image_folder(run_dir)
    public = [folder.put(encode_png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))) for _ in range(2)]
    own = collect.load_index(run_dir).query("part == 'labelled'").groupby("prompt").head(2)
    (prompt, rows), *_ = own.groupby("prompt")
    first, second = rows["image"]
    with FeedbackStore(recipe.feedback_url(run_dir)) as store:
        store.add_compared("own", "x", [compared(str(prompt), first, second, "first")])
        store.add_compared("public", "x", [compared("a cat", *public, "second")])
        store.add_compared("another", "x", [compared("a dog", *public, "second")])
    for stage in (collect, judge, learn_reward, score):
        stage.run(recipe, run_dir)
    manifest = finetune.run(recipe, run_dir)
    assert manifest.config["preferences"] == {"from": "comparisons", "pairs": 2}
    found = load(recipe, run_dir, load_scores(run_dir))
    keys = list(zip(found.images["image"], found.images["prompt"], strict=True))
    pairs = {(keys[chosen], keys[rejected]) for chosen, rejected in found.tensors["pair_Q2"].tolist()}
    assert pairs == {
        ((first, prompt), (second, prompt)),
        ((public[1], "a cat"), (public[0], "a cat")),
    }
    assert found.images.set_index("image")["reward"][public[0]] == 0
    assert json.loads((run_dir / "snapshot" / "manifest.json").read_text())["files"].keys() > {
        "comparisons.parquet"
    }
    small = folder.put(encode_png(np.zeros((32, 32, 3), dtype=np.uint8)))
    with FeedbackStore(recipe.feedback_url(run_dir)) as store:
        store.add_compared("small", "x", [compared("a cat", public[0], small, "second")])
    shutil.rmtree(run_dir / "snapshot")
    (run_dir / "stages" / "snapshot.json").unlink()
    other = load_recipe(scored / "recipe.yaml", [*CHANGES, *changes, "feedback.comparisons=[public, small]"])
    judge.run(other, run_dir)
    with pytest.raises(FeedbackError, match=r"32 x 32 pixels.*64 x 64.*--size"):
        load(other, run_dir, load_scores(run_dir))


def compared(prompt: str, first: str, second: str, answer: str) -> Compared:
    return Compared(prompt, "imported", "alignment", (first,), (second,), "ann", answer)


def test_further_rounds_have_nobody_who_judges_them(scored: Path) -> None:
    rounds = "on_policy={rounds: 1, images: {prompts: {colour: 1}, images_per_prompt: {colour: 4}}}"
    with pytest.raises(ConfigError, match=r"on_policy.rounds is 1; expected 0"):
        load_recipe(scored / "recipe.yaml", [*CHANGES, "finetune.objective=diffusion_kto", rounds])


def test_judgements_that_all_are_learned_from_hold_nobody_out(scored: Path) -> None:
    guards = "finetune.guards={prompts: {colour: 2}}"
    load_recipe(scored / "recipe.yaml", [*CHANGES, guards])
    with pytest.raises(ConfigError, match=r"none are held out for finetune.guards.held_out: judgements"):
        load_recipe(scored / "recipe.yaml", [*CHANGES, guards, "finetune.objective=diffusion_kto"])


def test_scores_of_an_image_of_two_prompts_stay_apart(scored: Path) -> None:
    recipe = load_recipe(scored / "recipe.yaml", [*CHANGES, "finetune.objective=diffusion_kto"])
    scores = load_scores(scored / "run")
    twice = pd.concat([scores, scores.assign(prompt="another", reward=9.0)], ignore_index=True)
    images = load(recipe, scored / "run", twice).images
    assert len(images) == 16
    assert (images["reward"] < 9).all()
