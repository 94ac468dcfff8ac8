"""Prompts to text states and images to latents: once, before fine-tuning, rather than at each of its steps.

Shapes: K prompts, T text tokens, D text width, B images, C channels, H W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.diffusion.model import DiffusionModel
from accord.errors import ImageError

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(model: DiffusionModel, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
    """The text encoder's last hidden states, as StableDiffusionPipeline passes them to the UNet: text_KTD,
    one row a prompt, in the given order, on the model's device. A prompt that occurs again is encoded once.

    A prompt longer than the tokenizer's limit is cut there, with a warning, as diffusers does.
    """
    unique = list(dict.fromkeys(prompts))
    row = {prompt: i for i, prompt in enumerate(unique)}
    limit = model.tokenizer.model_max_length
    encoded = []
    for start in range(0, len(unique), batch_size):
        part = unique[start : start + batch_size]
        tokens = model.tokenizer(
            part, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        for prompt, length in zip(part, map(len, model.tokenizer(part).input_ids), strict=True):
            if length > limit:
                logger.warning("prompt cut at %d of its %d tokens: %r", limit, length, prompt)
        uses_mask = getattr(model.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(model.device) if uses_mask else None
        encoded.append(model.text_encoder(tokens.input_ids.to(model.device), attention_mask=mask)[0])
    return torch.cat(encoded)[[row[prompt] for prompt in prompts]]


@torch.no_grad()
def encode_images(model: DiffusionModel, images_BHWC: np.ndarray[Any, Any], batch_size: int = 64) -> Tensor:
    """uint8 RGB images to latents_BCHW, float32 on the CPU: the posterior's MEAN (its noise cannot be
    learnt), shifted and times the VAE's scaling factor.

    Raises ImageError for another shape or type, or a size that the VAE cannot encode.
    """
    factor = model.vae_scale_factor
    shape = images_BHWC.shape
    if (
        images_BHWC.dtype != np.uint8
        or len(shape) != 4
        or shape[3] != 3
        or shape[1] % factor
        or shape[2] % factor
    ):
        raise ImageError(
            f"expected uint8 images [B, H, W, 3] with H and W multiples of {factor}, "
            f"got {images_BHWC.dtype} {shape}"
        )
    scale, shift = model.vae.config.scaling_factor, model.vae.config.get("shift_factor") or 0.0
    latents = []
    for start in range(0, len(images_BHWC), batch_size):
        pixels_BHWC = torch.from_numpy(np.ascontiguousarray(images_BHWC[start : start + batch_size]))
        pixels_BCHW = pixels_BHWC.to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mean_BCHW = model.vae.encode(pixels_BCHW.to(model.dtype)).latent_dist.mean
        latents.append(((mean_BCHW.float() - shift) * scale).cpu())  # device-to-host sync, once a batch
    if not latents:
        return torch.zeros(0, model.latent_channels, shape[1] // factor, shape[2] // factor)
    return torch.cat(latents)
