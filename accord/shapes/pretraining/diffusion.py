"""Trains the sandbox's base model: a UNet and a CLIP text encoder, in the stock pipeline's format.

What made it learn on two cores is in docs/sandbox.md. In short: targets are posterior means;
the schedule ends in pure noise and many timesteps are drawn there, because only there must the words be
read; captions are right at first and wrong in part at the end.

Legend: N scenes, B batch, C H W latents, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from accord.config import Config
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import add_noise, denoising_loss, denoising_target
from accord.prompts import Grammar
from accord.shapes.captions import PRETRAINING_NOISE, CaptionNoise, caption, corrupt
from accord.shapes.pretraining.data import Log, SceneData, cosine
from accord.shapes.pretraining.tokenizer import CONTEXT_LENGTH
from accord.shapes.pretraining.vae import encode_mean


class DiffusionConfig(Config):
    """Sizes, caption noise and optimisation of the base model."""

    steps: int = 5_500
    batch_size: int = 32
    learning_rate: float = 1e-3
    noisy_share: float = 0.25
    noise: CaptionNoise = PRETRAINING_NOISE
    pure_noise_share: float = 0.2
    prompt_dropout: float = 0.1
    ema_decay: float = 0.997
    channels: tuple[int, ...] = (64, 128)
    text_width: int = 96
    probe_every: int = 500
    seed: int = 5


def make_scheduler() -> Any:
    """Stable Diffusion's betas, rescaled to end in pure noise (Lin et al. 2023); v-prediction."""
    scheduler: Any = DDIMScheduler  # diffusers is untyped
    return scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_networks(tokenizer: CLIPTokenizer, config: DiffusionConfig, latents: int) -> tuple[Any, Any]:
    """The UNet, with cross-attention at both levels, and a text encoder of two layers."""
    network: Any = UNet2DConditionModel
    unet = network(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.channels),
        cross_attention_dim=config.text_width,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    return unet, text


def draw_timesteps(batch_size: int, pure_noise_share: float, generator: torch.Generator) -> Tensor:
    """t = 1000 sqrt(u), more at high noise, with a share at the last step, which shows the words alone."""
    u_B = torch.rand(batch_size, generator=generator)
    timesteps_B = (1000 * u_B.sqrt()).long().clamp(max=999)
    timesteps_B[: int(pure_noise_share * batch_size)] = 999
    return timesteps_B


def train_diffusion(
    data: SceneData,
    vae: Any,
    tokenizer: CLIPTokenizer,
    grammar: Grammar,
    config: DiffusionConfig,
    log: Log,
    probe: Callable[[DiffusionModel, int], None],
) -> DiffusionModel:
    """Denoising (v) on latents, UNet and text encoder jointly; returns their moving averages.

    Args:
        probe: called every `probe_every` steps with the averaged model, to watch what it has learned.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    latents_NCHW = encode_mean(vae, data.images_NCHW)
    scheduler = make_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod
    unet, text = make_networks(tokenizer, config, latents_NCHW.shape[1])
    trained = nn.ModuleList([unet, text]).train()
    averaged_unet, averaged_text = make_networks(tokenizer, config, latents_NCHW.shape[1])
    averaged = nn.ModuleList([averaged_unet, averaged_text]).eval().requires_grad_(False)
    averaged.load_state_dict(trained.state_dict())
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    ids: dict[str, list[int]] = {}

    def tokens(texts: list[str]) -> Tensor:
        for words in texts:
            if words not in ids:
                ids[words] = tokenizer(words, padding="max_length", max_length=CONTEXT_LENGTH).input_ids
        return torch.tensor([ids[words] for words in texts])

    def model() -> DiffusionModel:
        return DiffusionModel(
            averaged_unet, vae, averaged_text, tokenizer, scheduler, directory="", digest=""
        )

    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, config.steps, warmup=100)
        noise_now = config.noise if step >= (1 - config.noisy_share) * config.steps else CaptionNoise()
        index_B = torch.randint(len(data.scenes), (config.batch_size,), generator=generator)
        drop_B = rng.random(config.batch_size) < config.prompt_dropout
        texts = [
            "" if drop else caption(corrupt(data.scenes[i], noise_now, rng), grammar, rng)
            for i, drop in zip(index_B.tolist(), drop_B, strict=True)
        ]
        latents = latents_NCHW[index_B]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps_B = draw_timesteps(config.batch_size, config.pure_noise_share, generator)
        noisy = add_noise(latents, noise, timesteps_B, alphas_cumprod)
        target = denoising_target(latents, noise, timesteps_B, alphas_cumprod, "v_prediction")
        text_BTD = text(tokens(texts)).last_hidden_state
        loss = denoising_loss(unet(noisy, timesteps_B, text_BTD).sample, target).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), 1 - decay)
        if step % 100 == 0:
            log(f"diffusion {step}/{config.steps} loss {loss.item():.4f}")
        if step % config.probe_every == config.probe_every - 1:
            probe(model(), step + 1)
    return model()
