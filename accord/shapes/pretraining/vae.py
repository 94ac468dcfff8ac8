"""Trains the sandbox's autoencoder: 64x64x3 pixels to 8x8x8 latents, whitened.

Legend: B batch, C channels, H W pixels, L latent channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from accord.config import Config
from accord.shapes.pretraining.data import Log, SceneData, cosine, random_flip, to_float


class VaeConfig(Config):
    """Sizes and optimisation of the autoencoder."""

    steps: int = 1_900
    batch_size: int = 16
    learning_rate: float = 2e-3
    object_weight: float = 4.0
    kl_weight: float = 2e-6
    channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 8
    seed: int = 2


def _object_weight(images_BCHW: Tensor, weight: float) -> Tensor:
    """More weight on the objects and their rims, few pixels but the whole meaning: (B, 1, H, W)."""
    border = images_BCHW[:, :, :2].mean(dim=(2, 3), keepdim=True)
    object_B1HW = ((images_BCHW - border).abs().amax(1, keepdim=True) > 0.3).float()
    return 1.0 + (weight - 1.0) * F.max_pool2d(object_B1HW, 5, stride=1, padding=2)


def train_vae(data: SceneData, config: VaeConfig, log: Log) -> Any:
    """Reconstruction (L1 + 0.5 L2) with a light KL term; ends by whitening the latents."""
    torch.manual_seed(config.seed)
    autoencoder: Any = AutoencoderKL  # diffusers is untyped
    vae = autoencoder(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    vae.train().to(memory_format=torch.channels_last)  # a third faster on CPUs
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, config.steps)
        index_B = torch.randint(len(data.scenes), (config.batch_size,), generator=generator)
        images = random_flip(to_float(data.images_NCHW[index_B]), generator)
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = (decoded - images).abs() + 0.5 * (decoded - images).square()
        loss = (
            _object_weight(images, config.object_weight) * error
        ).mean() + config.kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log(f"vae {step}/{config.steps} loss {loss.item():.4f}")
    vae.eval().requires_grad_(False)
    whiten(vae, data)
    return vae


@torch.no_grad()
def encode_mean(vae: Any, images_NCHW: Tensor, batch_size: int = 128) -> Tensor:
    """Posterior means of uint8 images, shape (N, L, 8, 8)."""
    return torch.cat(
        [vae.encode(to_float(part)).latent_dist.mean for part in torch.split(images_NCHW, batch_size)]
    )


@torch.no_grad()
def whiten(vae: Any, data: SceneData, count: int = 2_000) -> None:
    """Fold the latents' mean and spread into the 1x1 convolutions: each channel then has mean 0 and spread 1.

    The diffusion model then needs no scaling factor (it is 1), and every scheduler's noise fits the signal.
    """
    latents_NLHW = encode_mean(vae, data.images_NCHW[:count])
    mean_L = latents_NLHW.mean(dim=(0, 2, 3))
    std_L = latents_NLHW.std(dim=(0, 2, 3))
    channels = len(mean_L)
    out, back = vae.quant_conv, vae.post_quant_conv
    assert out is not None
    assert back is not None
    assert out.bias is not None
    assert back.bias is not None
    out.weight[:channels] /= std_L[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean_L) / std_L
    out.bias[channels:] -= 2.0 * std_L.log()
    back.bias += back.weight[:, :, 0, 0] @ mean_L
    back.weight *= std_L[None, :, None, None]
