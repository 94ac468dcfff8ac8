"""Prompts to text states and images to latents: once, before fine-tuning, rather than at each of its steps.

Shapes: K prompts, T text tokens, D text width, B images, C channels, H W height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accord.diffusion.conditioning import encode_conditioning
from accord.diffusion.model import DiffusionModel, vae_batch
from accord.errors import ImageError
from accord.images import decode_image


def encode_prompts(model: DiffusionModel, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
    """The states_KTD alone of `encode_conditioning`: all that there is, but for SDXL."""
    return encode_conditioning(model, prompts, batch_size=batch_size)["states"]


@torch.no_grad()
def encode_images(model: DiffusionModel, images_BHWC: np.ndarray[Any, Any], batch_size: int = 64) -> Tensor:
    """uint8 RGB images to latents_BCHW, float32 on the CPU: the posterior's MEAN (its noise cannot be
    learnt), scaled as the model's pipeline does it.

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
    scale_C11, shift_C11 = model.latent_scaling()
    batch_size = vae_batch(batch_size, shape[1], shape[2])
    latents = []
    for start in range(0, len(images_BHWC), batch_size):
        pixels_BHWC = torch.from_numpy(np.ascontiguousarray(images_BHWC[start : start + batch_size]))
        pixels_BCHW = pixels_BHWC.to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mean_BCHW = model.vae.encode(pixels_BCHW.to(model.vae_dtype)).latent_dist.mean
        # device-to-host sync, once a batch
        latents.append((mean_BCHW.float().cpu() - shift_C11) * scale_C11)
    if not latents:
        return torch.zeros(0, model.latent_channels, shape[1] // factor, shape[2] // factor)
    return torch.cat(latents)


def encode_pngs(model: DiffusionModel, files: Iterable[bytes], batch_size: int = 64) -> Tensor:
    """`encode_images` of image files, of whose pixels a batch is in memory at a time.

    Raises ImageError when they are not all of one size, or for what the VAE makes no numbers of.
    """
    parts: list[Tensor] = []
    size = None
    waiting = iter(files)
    while batch := list(itertools.islice(waiting, batch_size)):
        images = [decode_image(file) for file in batch]
        size = images[0].shape if size is None else size
        for image_HWC in images:
            if image_HWC.shape != size:
                raise ImageError(
                    f"an image has {image_HWC.shape[1]} x {image_HWC.shape[0]} pixels, others have {size[1]} "
                    f"x {size[0]}; fine-tuning needs one size: give the source the option size"
                )
        parts.append(encode_images(model, np.stack(images), batch_size))
    return _finite(torch.cat(parts), "images")


def encode_texts(
    model: DiffusionModel, texts: Sequence[str], *, negative: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`encode_conditioning` on the CPU, to be kept in `dtype`.

    In bfloat16 it is what a network that computes in bfloat16 rounds its texts to anyway.
    """
    encoded = encode_conditioning(model, texts, negative=negative)
    return {name: _finite(rows.cpu(), "prompts").to(dtype) for name, rows in encoded.items()}


def _finite(rows: Tensor, what: str) -> Tensor:
    """Checked as they are made: what is mapped is not read through before it is used."""
    if not bool(torch.isfinite(rows).all()):
        raise ImageError(f"the model encodes {what} to NaN or infinity: its weights are damaged")
    return rows
