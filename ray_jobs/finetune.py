"""Fine-tune the model on rewarded images (the paper's stage 3), and a control on pre-training images
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from accord.artifacts import Manifest, read_manifest
from accord.diffusion.settings import FREE_KEYS, FinetuneConfig
from accord.errors import FeedbackError
from accord.recipe import Recipe
from ray_jobs import _cli, cluster, collect, inputs, preferences, sources
from ray_jobs.finetune_data import prepare_data
from ray_jobs.generation import Source
from ray_jobs.guards import Guards
from ray_jobs.score import load_scores, rewards_of
from ray_jobs.snapshots import Snapshots, unet_of
from ray_jobs.stages import Stage, is_done, required, timed
from ray_jobs.train import Tracking, Training, train

if TYPE_CHECKING:  # takes seconds to import
    import torch

KIND = "diffusion_model"
BUILD = "ray_jobs.finetune:build_learner"


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """aligned/ and control/: the control takes as many steps on the pre-training term of Eq. 2 alone, so that
    what it shows is not owed to the feedback.
    """
    scores = required(run_dir, "scores")
    pretraining = sources.run(recipe, run_dir, "pretraining")
    base = inputs.base_model(recipe)
    digests = {"model": base.digest, "scores": scores.digest, "pretraining": pretraining.digest}
    judged = _preferences(recipe, run_dir)
    if judged is not None:
        digests["snapshot"] = required(run_dir, "snapshot").digest
    rounds = _rounds_config(recipe)
    configs = {
        "aligned": recipe.finetune,
        "control": recipe.finetune.model_copy(
            update={
                "objective": "pretraining_only",
                "pretraining_threshold": None,
                "pretraining_favourites": False,
                "guards": None,
                "steps": recipe.finetune.steps * (1 + recipe.on_policy.rounds),
            }
        ),
    }
    further: dict[str, dict[str, Any]] = {"aligned": {"on_policy": rounds} if rounds else {}, "control": {}}
    if judged is not None:
        further["aligned"]["preferences"] = judged.note
    further["aligned"] |= _guards_config(recipe)
    stages = {
        name: Stage(
            name,
            KIND,
            config.decisive() | further[name],
            recipe.seed,
            digests,
            defaults=FinetuneConfig().decisive(),
            free=FREE_KEYS - {"guards"},  # these are in `further`
        )
        for name, config in configs.items()
        if name == "aligned" or has_control(recipe)
    }
    missing = [name for name, stage in stages.items() if not is_done(stage, run_dir)]
    if missing:
        with timed(run_dir, "finetune"):
            images = _first_images(recipe, run_dir) if judged is None else judged.images
            more = None if judged is None else judged.tensors
            data = _prepared(recipe, run_dir, base, images, run_dir / "work" / "aligned", more)
            guards = None
            if recipe.finetune.guards is not None and "aligned" in missing:
                guards = Guards(recipe, run_dir, recipe.finetune.guards)
            trainings = [
                _training(recipe, run_dir, name, configs[name], data, base, 1, guards) for name in missing
            ]
            checkpoints = train(trainings, run_dir / "train", recipe.ray, guards)
            for name, training, checkpoint in zip(missing, trainings, checkpoints, strict=True):
                if name == "aligned" and recipe.on_policy.rounds:
                    training, checkpoint = _further_rounds(
                        recipe, run_dir, stages, training, checkpoint, guards
                    )
                stage = stages[name]
                if guards is not None and name == "aligned" and guards.decision().tripped:
                    _save_best(guards, base, run_dir / stage.name, stage)
                else:
                    verdict = _verdict(guards) if name == "aligned" else {}
                    _save(
                        training, checkpoint, run_dir / stage.name, stage.inputs, {**stage.config, **verdict}
                    )
    return read_manifest(run_dir / "aligned")


def has_control(recipe: Recipe) -> bool:
    """Without a pre-training term there is nothing to train a control on."""
    return recipe.control and recipe.finetune.beta > 0 and recipe.finetune.pretraining_batch_size > 0


def _first_images(recipe: Recipe, run_dir: Path) -> pd.DataFrame:
    """The images of the first round: columns image, prompt and reward."""
    scores = load_scores(run_dir)
    if recipe.finetune.images == "labelled":
        scores = scores[scores["part"] == "labelled"]
    if scores.empty:
        raise FeedbackError("there are no generated images to learn from: collect some first")
    return scores[["image", "prompt", "reward"]]


def _preferences(recipe: Recipe, run_dir: Path) -> preferences.Preferences | None:
    """What people said themselves, where the objective learns from that."""
    if not recipe.finetune.is_preference:
        return None
    required(run_dir, "snapshot")
    return preferences.load(recipe, run_dir, load_scores(run_dir))


def _rounds_config(recipe: Recipe) -> dict[str, Any]:
    """All that determines the images of further rounds; empty without any."""
    if not recipe.on_policy.rounds:
        return {}
    collected = recipe.collect.model_dump(mode="json", include={"sampler", "batch_size"})
    return {**recipe.on_policy.model_dump(mode="json"), **collected, "grammar": recipe.grammar}


def _guards_config(recipe: Recipe) -> dict[str, Any]:
    """All that determines which snapshot the guards choose; empty without guards."""
    if recipe.finetune.guards is None:
        return {}
    sampled = recipe.collect.model_dump(mode="json", include={"sampler", "batch_size"})
    settings = recipe.finetune.guards.model_dump(mode="json")
    return {"guards": {**settings, **sampled, "grammar": recipe.grammar}}


def _verdict(guards: Guards | None) -> dict[str, Any]:
    """What the guards said, for the manifest."""
    return {} if guards is None else {"guards_verdict": guards.decision().as_dict()}


def _further_rounds(
    recipe: Recipe,
    run_dir: Path,
    stages: Mapping[str, Stage],
    training: Training,
    checkpoint: Path,
    guards: Guards | None,
) -> tuple[Training, Path]:
    """Each round draws images from the model as it is by then, scores them, and fine-tunes on them; the last
    round's training and its checkpoint. Guards that have stopped a round let no other begin.
    """
    for number in range(2, recipe.on_policy.rounds + 2):
        if guards is not None and guards.has_stopped():
            break
        directory = run_dir / "work" / "aligned" / f"round-{number}"
        model = directory / "model"
        if not (model / "manifest.json").exists():
            stage = stages["aligned"]
            _save(training, checkpoint, model, stage.inputs, {**stage.config, "rounds_done": number - 1})
        source = Source(model, read_manifest(model).digest)
        images = collect.generate_part(
            recipe, run_dir, f"round {number}", recipe.on_policy.images, source, directory
        )
        if not (directory / "data.safetensors").exists():
            images["reward"] = cluster.on_device(recipe.ray, rewards_of, recipe, run_dir, images)
        data = _prepared(recipe, run_dir, source, images, directory)
        name = f"aligned-round-{number}"
        training = _training(recipe, run_dir, name, recipe.finetune, data, source, number, guards)
        (checkpoint,) = train([training], run_dir / "train", recipe.ray, guards)
    return training, checkpoint


def _prepared(
    recipe: Recipe,
    run_dir: Path,
    model: Source,
    images: pd.DataFrame,
    directory: Path,
    more: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """DIRECTORY/data.safetensors with `more` fields, made unless it is there."""
    data = directory / "data.safetensors"
    if not data.exists():
        prepare_data(recipe, model, run_dir, images, data, dict(more or {}))
    return data


def build_learner(
    *,
    rank: int,
    world_size: int,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] | None,
    device: torch.device,
    model: str,
    data: str,
    config: dict[str, Any],
    seed: int,
) -> Any:
    """A Finetuner on a worker."""
    from accord.diffusion.finetune import Finetuner
    from accord.diffusion.finetune_data import load_data
    from accord.diffusion.model import load_diffusion_model
    from accord.diffusion.sharding import shard

    loaded = load_data(data)
    settings = FinetuneConfig(**config)
    base = load_diffusion_model(model, device=device)
    if wrap is not None and settings.sharding == "fsdp":
        wrap = shard
    return Finetuner(base, loaded, settings, seed, rank=rank, world_size=world_size, wrap=wrap)


def _training(
    recipe: Recipe,
    run_dir: Path,
    name: str,
    config: FinetuneConfig,
    data: Path,
    model: Source,
    number: int = 1,
    guards: Guards | None = None,
) -> Training:
    """`number` is that of the round: each draws random numbers of its own."""
    snapshots: Snapshots | None = None
    if guards is not None and name != "control":
        snapshots = guards.snapshots(name, (number - 1) * config.steps, str(model.directory))
    drawn = int(np.random.SeedSequence([recipe.seed, number]).generate_state(1)[0]) >> 1
    seed = recipe.seed if number == 1 else drawn
    return Training(
        name=name,
        build=BUILD,
        arguments={
            "model": str(model.directory),
            "data": str(data),
            "config": config.model_dump(mode="json", exclude={"guards"}),
            "seed": seed,
        },
        steps=config.steps,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        title="  control"
        if name == "control"
        else "Fine-tuning" + (f", round {number}" if number > 1 else ""),
        tracking=Tracking(
            uri=recipe.tracking_uri(run_dir),
            experiment=recipe.tracking.experiment,
            run_name=f"{recipe.name} {name}",
            params={**config.model_dump(mode="json"), "seed": seed},
            tags={"stage": name, "model": model.digest, "scores": required(run_dir, "scores").digest},
        ),
        snapshots=snapshots,
    )


def _save(
    training: Training,
    checkpoint: Path,
    directory: Path,
    digests: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """The model that was trained, with the averaged UNet of its finished training; whole, also where adapters
    were trained."""
    from accord.diffusion.checkpoint import put_trained
    from accord.diffusion.model import load_diffusion_model, save_diffusion_model

    arguments = training.arguments
    model = load_diffusion_model(arguments["model"])
    put_trained(model.unet, checkpoint, model.digest, FinetuneConfig(**arguments["config"]))
    save_diffusion_model(model, directory, inputs=digests, config=config, seed=arguments["seed"])


def _save_best(guards: Guards, base: Source, directory: Path, stage: Stage) -> None:
    """The snapshot that the guards keep; the base model itself when no snapshot was better."""
    from accord.diffusion.model import load_diffusion_model, save_diffusion_model

    model = load_diffusion_model(base.directory)
    best = guards.best()
    if best is not None:
        model = replace(model, unet=unet_of(best))
    config = {**stage.config, **_verdict(guards)}
    save_diffusion_model(model, directory, inputs=stage.inputs, config=config, seed=stage.seed)


if __name__ == "__main__":
    _cli.main("finetune")
