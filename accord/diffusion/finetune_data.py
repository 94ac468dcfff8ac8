"""What fine-tuning learns from, encoded once (encode.py), and the checks that say early what would fail late.

Shapes: N generated images, M pre-training images, Q pairs of generated images, C latent channels, H W latent
height and width, K prompts, T text tokens, D text width, P width of the pooled
text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from accord.artifacts import load_tensors, save_tensors, sha256_bytes
from accord.diffusion.model import DiffusionModel
from accord.diffusion.rows import HELD_BYTES, MappedRows, open_rows
from accord.errors import ConfigError, FeedbackError

PARTS = "parts"
"""Of the file's metadata: which fields are in other files."""


@dataclass(frozen=True)
class FinetuneData:
    """Everything encoded once (encode.py), on any device, latents and texts in any float type; what is large
    may be mapped from files."""

    latents_NCHW: Tensor | MappedRows
    text_index_N: Tensor  # rows of text_KTD
    reward_N: Tensor
    pretraining_latents_MCHW: Tensor | MappedRows
    pretraining_text_index_M: Tensor
    pretraining_reward_M: Tensor  # of each image for its caption; read only if a threshold asks for it
    text_KTD: Tensor | MappedRows
    empty_text_TD: Tensor  # of the empty prompt, for condition dropout: what guidance leads away from
    pooled_KP: Tensor | MappedRows | None = None  # of SDXL only, as the next
    empty_pooled_P: Tensor | None = None
    label_N: Tensor = field(default_factory=lambda: torch.zeros(0))
    """For diffusion_kto: what people said: above 0 is good, below 0 bad, 0 undecided; and how sure it is."""
    pair_Q2: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))
    """For diffusion_dpo: places of a chosen and a rejected image of the same prompt."""

    def conditioning(self) -> dict[str, Tensor | MappedRows]:
        """What the prompts mean, by name (conditioning.py), one row a prompt."""
        pooled = {} if self.pooled_KP is None else {"pooled": self.pooled_KP}
        return {"states": self.text_KTD, **pooled}

    def empty(self) -> dict[str, Tensor]:
        """The same of no prompt, without a dimension of prompts."""
        pooled = {} if self.empty_pooled_P is None else {"pooled": self.empty_pooled_P}
        return {"states": self.empty_text_TD} | pooled

    def fingerprint(self) -> str:
        """A digest of rewards, judgements, captions and sizes (not of latents, which may be gigabytes)."""
        parts = [
            str([tuple(t.shape) for t in (self.latents_NCHW, self.pretraining_latents_MCHW, self.text_KTD)])
        ]
        for tensor in (
            self.text_index_N,
            self.reward_N.float(),
            self.pretraining_text_index_M,
            self.pretraining_reward_M.float(),
            *(judged for judged in (self.label_N, self.pair_Q2) if judged.numel()),
        ):
            parts.append(sha256_bytes(tensor.cpu().contiguous().numpy().tobytes()))
        return sha256_bytes(" ".join(parts).encode())


def save_data(
    path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[str, Sequence[Path]]]
) -> None:
    """FinetuneData as safetensors: fields as they are, and `parts`: of others, the name in which files they
    lie, in pieces one after the other. Files are named relative to `path`, so that a run can be copied.

    Raises StorageError when the disk is full.
    """
    listed = {
        field: [name, *(os.path.relpath(file, path.parent) for file in files)]
        for field, (name, files) in parts.items()
    }
    save_tensors(path, tensors, {PARTS: json.dumps(listed)})


def load_data(path: str | Path, held_bytes: int = HELD_BYTES) -> FinetuneData:
    """What `save_data` wrote; a field of more than `held_bytes` stays in its files, mapped.

    Raises ArtifactError when a file is missing or damaged.
    """
    path = Path(path)
    fields: dict[str, Any] = dict(load_tensors(path))
    with safe_open(path, framework="pt", device="cpu") as file:
        listed = json.loads((file.metadata() or {}).get(PARTS, "{}"))
    for field_name, (name, *files) in listed.items():
        fields[field_name] = open_rows([path.parent / file for file in files], name, held_bytes)
    return FinetuneData(**fields)


def check_data(
    model: DiffusionModel, data: FinetuneData, num_model: int, num_pretraining: int, world_size: int
) -> None:
    """Says early and plainly what would fail late and darkly.

    `num_model` and `num_pretraining` are the images (or pairs) of a batch over all workers. Raises
    FeedbackError when there is nothing to learn from, ConfigError for data or workers that do not fit.
    """
    if num_model and len(data.latents_NCHW) == 0:
        raise FeedbackError("fine-tuning has no generated images: collect and score some first")
    if num_pretraining and len(data.pretraining_latents_MCHW) == 0:
        raise ConfigError(
            "fine-tuning has no pre-training images, but beta and pretraining_batch_size ask for some: give "
            "a pre-training source, or set finetune.beta=0"
        )
    if num_model + num_pretraining < world_size:
        raise ConfigError(
            f"a batch of {num_model} + {num_pretraining} images is too small for {world_size} workers"
        )
    used: list[tuple[str, Tensor | MappedRows, Tensor]] = []
    if num_model:
        used.append(("generated", data.latents_NCHW, data.text_index_N))
        if len(data.reward_N) != len(data.latents_NCHW) or not bool(torch.isfinite(data.reward_N).all()):
            raise FeedbackError("fine-tuning needs one finite reward for each generated image")
    if num_pretraining:
        used.append(("pre-training", data.pretraining_latents_MCHW, data.pretraining_text_index_M))
    for name, latents, index in used:
        if latents.ndim != 4 or latents.shape[1] != model.latent_channels:
            raise ConfigError(
                f"{name} latents are {tuple(latents.shape)}; expected [N, {model.latent_channels}, H, W]"
            )
        if len(index) != len(latents) or int(index.min()) < 0 or int(index.max()) >= len(data.text_KTD):
            raise ConfigError(
                f"each {name} image needs a text_index into the {len(data.text_KTD)} encoded prompts"
            )
    _check_conditioning(model, data)


def _check_conditioning(model: DiffusionModel, data: FinetuneData) -> None:
    width: Any = model.unet.config.cross_attention_dim
    if (
        data.text_KTD.ndim != 3
        or data.text_KTD.shape[2] != width
        or data.text_KTD.shape[1:] != data.empty_text_TD.shape
    ):
        raise ConfigError(
            f"text states are {tuple(data.text_KTD.shape)}, of the empty prompt "
            f"{tuple(data.empty_text_TD.shape)}; expected [K, T, {width}] and [T, {width}]"
        )
    pooled_KP, empty_P = data.pooled_KP, data.empty_pooled_P
    if not model.is_xl:
        if pooled_KP is not None or empty_P is not None:
            raise ConfigError(
                "there are pooled texts, which only SDXL takes: encode the prompts with this model"
            )
        return
    pooled = model.text_encoder_2.config.projection_dim
    expected = (len(data.text_KTD), pooled)
    if pooled_KP is None or empty_P is None or pooled_KP.shape != expected or empty_P.shape != (pooled,):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (pooled_KP, empty_P)]
        raise ConfigError(
            f"SDXL needs pooled texts [{expected[0]}, {pooled}], and [{pooled}] of the empty prompt; "
            f"got {shapes}"
        )


def check_preferences(data: FinetuneData, objective: str) -> None:
    """Raises FeedbackError when people's judgements are not there that `objective` learns from, or too few,
    ConfigError when they are not those of the images.
    """
    images = len(data.latents_NCHW)
    if objective == "diffusion_kto":
        if data.label_N.shape != (images,):
            raise ConfigError(
                f"label_N is {tuple(data.label_N.shape)}; expected one label of {images} images"
            )
        good, bad = int((data.label_N > 0).sum()), int((data.label_N < 0).sum())
        if not good or not bad:
            raise FeedbackError(
                f"diffusion_kto needs images that people called good and others that they called bad; of "
                f"{images} there are {good} good and {bad} bad ones. Collect more judgements."
            )
    if objective == "diffusion_dpo":
        pairs = data.pair_Q2
        if len(pairs) == 0:
            raise FeedbackError(
                "diffusion_dpo needs two images of one prompt of which people preferred one, or called one "
                "good and the other bad; there are none: collect more images of each prompt, or comparisons"
            )
        if pairs.ndim != 2 or pairs.shape[1] != 2 or int(pairs.min()) < 0 or int(pairs.max()) >= images:
            raise ConfigError(
                f"pair_Q2 is {tuple(pairs.shape)}; expected [Q, 2] places of the {images} images"
            )
        if bool((data.text_index_N[pairs[:, 0]] != data.text_index_N[pairs[:, 1]]).any()):
            raise ConfigError("pair_Q2 pairs images of different prompts; both must be of the same")
