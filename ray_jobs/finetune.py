"""Fine-tune the model by reward-weighted likelihood (the paper's stage 3), and a control on pre-training
images alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accord.artifacts import Manifest, load_tensors, read_manifest, save_tensors
from accord.diffusion.settings import FinetuneConfig
from accord.images import decode_image
from accord.recipe import Recipe
from ray_jobs import _cli, cluster, inputs, sources
from ray_jobs.generation import Source
from ray_jobs.score import load_scores
from ray_jobs.stages import Stage, is_done, required, timed
from ray_jobs.train import Tracking, Training, train

KIND = "diffusion_model"
BUILD = "ray_jobs.finetune:build_learner"
ENCODE_SIZE = 64


def run(recipe: Recipe, run_dir: Path) -> Manifest:
    """aligned/ and control/: the control takes as many steps on the pre-training term of Eq. 2 alone, so that
    what it shows is not owed to the feedback.
    """
    scores = required(run_dir, "scores")
    pretraining = sources.run(recipe, run_dir, "pretraining")
    base = inputs.base_model(recipe)
    digests = {"model": base.digest, "scores": scores.digest, "pretraining": pretraining.digest}
    configs = {
        "aligned": recipe.finetune,
        "control": recipe.finetune.model_copy(update={"objective": "pretraining_only"}),
    }
    stages = {
        name: Stage(name, KIND, config.model_dump(mode="json"), recipe.seed, digests)
        for name, config in configs.items()
        if name == "aligned" or has_control(recipe)
    }
    missing = [name for name, stage in stages.items() if not is_done(stage, run_dir)]
    if missing:
        with timed(run_dir, "finetune"):
            data = run_dir / "work" / "aligned" / "data.safetensors"
            if not data.exists():
                cluster.on_device(recipe.ray, prepare_data, str(base.directory), run_dir, data)
            trainings = [
                _training(recipe, run_dir, stages[name], configs[name], data, base) for name in missing
            ]
            checkpoints = train(trainings, run_dir / "train", recipe.ray)
            for training, checkpoint in zip(trainings, checkpoints, strict=True):
                _save(training, checkpoint, stages[training.name], run_dir)
    return read_manifest(run_dir / "aligned")


def has_control(recipe: Recipe) -> bool:
    """Without a pre-training term there is nothing to train a control on."""
    return recipe.finetune.beta > 0 and recipe.finetune.pretraining_batch_size > 0


def prepare_data(model_directory: str, run_dir: Path, path: Path) -> None:
    """All images as latents and all prompts as text states (safetensors), read by every worker."""
    from accord.diffusion.encode import encode_prompts
    from accord.diffusion.model import load_diffusion_model

    model = load_diffusion_model(model_directory, device="cuda" if torch.cuda.is_available() else "cpu")
    scores = load_scores(run_dir)
    folder = inputs.image_folder(run_dir)
    latents_NCHW = _encode(model, [folder.get(digest) for digest in scores["image"]])
    files, captions = sources.read(run_dir, "pretraining")
    pretraining_latents_MCHW = _encode(model, files)
    texts = {text: row for row, text in enumerate(dict.fromkeys([*scores["prompt"], *captions]))}
    text_KTD = encode_prompts(model, [*texts, ""]).cpu()
    tensors = {
        "latents_NCHW": latents_NCHW,
        "text_index_N": torch.tensor([texts[prompt] for prompt in scores["prompt"]]),
        "reward_N": torch.tensor(scores["reward"].to_numpy(), dtype=torch.float32),
        "pretraining_latents_MCHW": pretraining_latents_MCHW,
        "pretraining_text_index_M": torch.tensor([texts[caption] for caption in captions], dtype=torch.long),
        "text_KTD": text_KTD[:-1],
        "empty_text_TD": text_KTD[-1],
    }
    save_tensors(path, tensors)


def _encode(model: Any, files: list[bytes]) -> torch.Tensor:
    """Latents of PNG files, a batch in memory at a time."""
    from accord.diffusion.encode import encode_images

    parts = inputs.batches(files, ENCODE_SIZE)
    return torch.cat(
        [encode_images(model, np.stack([decode_image(file) for file in part])) for part in parts]
    )


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
    from accord.diffusion.finetune import FinetuneData, Finetuner
    from accord.diffusion.model import load_diffusion_model

    loaded = FinetuneData(**load_tensors(data))
    settings = FinetuneConfig(**config)
    base = load_diffusion_model(model, device=device)
    return Finetuner(base, loaded, settings, seed, rank=rank, world_size=world_size, wrap=wrap)


def _training(
    recipe: Recipe, run_dir: Path, stage: Stage, config: FinetuneConfig, data: Path, base: Source
) -> Training:
    return Training(
        name=stage.name,
        build=BUILD,
        arguments={
            "model": str(base.directory),
            "data": str(data),
            "config": config.model_dump(mode="json"),
            "seed": recipe.seed,
        },
        steps=config.steps,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        title="Fine-tuning" if stage.name == "aligned" else "  control",
        tracking=Tracking(
            uri=recipe.tracking_uri(run_dir),
            experiment=recipe.tracking.experiment,
            run_name=f"{recipe.name} {stage.name}",
            params={**config.model_dump(mode="json"), "seed": recipe.seed},
            tags={"stage": stage.name, **stage.inputs},
        ),
    )


def _save(training: Training, checkpoint: Path, stage: Stage, run_dir: Path) -> None:
    """The base model with the averaged UNet of a finished training."""
    from dataclasses import replace

    from accord.diffusion.model import load_diffusion_model, save_diffusion_model

    learner = build_learner(
        rank=0, world_size=1, wrap=None, device=torch.device("cpu"), **dict(training.arguments)
    )
    learner.load(checkpoint)
    base = load_diffusion_model(training.arguments["model"])
    save_diffusion_model(
        replace(base, unet=learner.averaged_unet()),
        run_dir / stage.name,
        inputs=stage.inputs,
        config=stage.config,
        seed=stage.seed,
    )


if __name__ == "__main__":
    _cli.main("finetune")
