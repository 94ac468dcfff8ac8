"""What fine-tuning learns from: images as latents, prompts as text states, and rewards, in one file for all
workers.

Latents and the rewards of captions are kept in the run directory under names that follow from what they were
made from, so that several runs on the same images make them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from accord.artifacts import load_tensors, read_manifest, save_tensors, sha256_bytes
from accord.images import decode_image
from accord.recipe import Recipe
from ray_jobs import inputs, sources
from ray_jobs.score import score_captioned

ENCODED = "work/encoded"
_BATCH = 64
_PROMPTS = 1024


def prepare_data(
    recipe: Recipe, model_directory: str, run_dir: Path, scored: pd.DataFrame, path: Path
) -> None:
    """All images as latents and all prompts as text states (safetensors).

    `scored`: columns image (digest), prompt and reward.
    """
    from accord.diffusion.conditioning import encode_conditioning
    from accord.diffusion.model import load_diffusion_model

    model = load_diffusion_model(model_directory, device="cuda" if torch.cuda.is_available() else "cpu")
    folder = inputs.image_folder(run_dir)
    latents_NCHW = _latents(model, run_dir, [folder.get(digest) for digest in scored["image"]])
    files, captions = sources.read(run_dir, "pretraining")
    pretraining_latents_MCHW = _latents(model, run_dir, files)
    texts = {text: row for row, text in enumerate(dict.fromkeys([*scored["prompt"], *captions]))}
    parts = [encode_conditioning(model, part) for part in inputs.batches(list(texts), _PROMPTS)]
    empty = encode_conditioning(model, [""], negative=True)
    tensors = {
        "latents_NCHW": latents_NCHW,
        "text_index_N": torch.tensor([texts[prompt] for prompt in scored["prompt"]]),
        "reward_N": torch.tensor(scored["reward"].to_numpy(), dtype=torch.float32),
        "pretraining_latents_MCHW": pretraining_latents_MCHW,
        "pretraining_text_index_M": torch.tensor([texts[caption] for caption in captions], dtype=torch.long),
        "pretraining_reward_M": _caption_rewards(recipe, run_dir, files, captions),
        "text_KTD": torch.cat([part["states"].cpu() for part in parts]),
        "empty_text_TD": empty["states"][0].cpu(),
    }
    if model.is_xl:
        tensors |= {
            "pooled_KP": torch.cat([part["pooled"].cpu() for part in parts]),
            "empty_pooled_P": empty["pooled"][0].cpu(),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


def _latents(model: Any, run_dir: Path, files: list[bytes]) -> torch.Tensor:
    """Latents of PNG files, a batch in memory at a time."""
    from accord.diffusion.encode import encode_images

    def make() -> torch.Tensor:
        parts = inputs.batches(files, _BATCH)
        return torch.cat(
            [encode_images(model, np.stack([decode_image(file) for file in part])) for part in parts]
        )

    return _once(run_dir, ["latents", model.digest, *map(sha256_bytes, files)], make)


def _caption_rewards(recipe: Recipe, run_dir: Path, files: list[bytes], captions: list[str]) -> torch.Tensor:
    """Of each pre-training image; zeros when nobody asks for them."""
    config = recipe.finetune
    if config.pretraining_threshold is None:
        return torch.zeros(len(files))
    favourites = config.pretraining_favourites
    reward = read_manifest(run_dir / "reward").digest
    return _once(
        run_dir,
        ["rewards", reward, recipe.grammar, str(favourites), *captions, *map(sha256_bytes, files)],
        lambda: torch.tensor(score_captioned(recipe, run_dir, files, captions, favourites=favourites)),
    )


def _once(run_dir: Path, made_from: Sequence[str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gives, kept under a name that follows from what it is made from."""
    name = sha256_bytes("\0".join(made_from).encode())[:32]
    path = run_dir / ENCODED / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"values": make()})
    return load_tensors(path)["values"]
