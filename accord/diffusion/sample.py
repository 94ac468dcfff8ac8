"""Prompts and seeds to images: the denoising loop, with any diffusers scheduler.

Shapes: B samples, C latent channels (images: 3 colours), H W height and width (of latents or pixels). Images
are uint8 RGB.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from accord.diffusion.conditioning import encode_conditioning, unet_arguments
from accord.diffusion.model import DiffusionModel, vae_batch
from accord.diffusion.settings import Precision, SamplerConfig
from accord.errors import ConfigError

__all__ = [
    "SamplerConfig",
    "decode_latents",
    "draw_noise",
    "initial_noise",
    "make_scheduler",
    "sample_images",
    "sample_latents",
    "seeded_generators",
    "vae_batch",
]


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise_BCHW on the CPU, float32; `shape` is (C, H, W). A sample's noise depends on its
    own seed alone: neither on its batch mates nor on the device."""
    return draw_noise(seeded_generators(seeds), shape)


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator on the CPU for each seed: what a sample draws does not depend on its batch mates."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """The next standard normal noise_BCHW of each generator, float32; `shape` is (C, H, W)."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def make_scheduler(model: DiffusionModel, config: SamplerConfig) -> Any:
    """A fresh scheduler of the named class with the model's noise schedule and prediction type.

    Raises ConfigError when diffusers has no such scheduler, or it has no such option.
    """
    scheduler_class: Any = getattr(diffusers, config.scheduler, None)
    if not (inspect.isclass(scheduler_class) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ConfigError(
            f"sampler: diffusers has no scheduler {config.scheduler!r}. Try DPMSolverMultistepScheduler, "
            "UniPCMultistepScheduler, EulerDiscreteScheduler or DDIMScheduler."
        )
    known = sorted(set(inspect.signature(scheduler_class.__init__).parameters) - {"self"})
    unknown = sorted(set(config.scheduler_options) - set(known))
    if unknown:
        raise ConfigError(
            f"sampler.scheduler_options: {config.scheduler} has no option {', '.join(unknown)}; "
            f"it has {', '.join(known)}"
        )
    schedulers: Any = scheduler_class
    return schedulers.from_config(model.scheduler.config, **config.scheduler_options)


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoises one sample for each (prompt, seed): latents_BCHW, float32 on the model's device.

    Classifier-free guidance (Ho & Salimans 2022) runs both halves as one batch of 2B; with guidance_scale
    <= 1 there is no second half. `progress` gets (steps done, steps).

    Raises ConfigError for unequal numbers of prompts and seeds, a size that the VAE cannot make, or a bad
    scheduler.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ConfigError(
            f"sampling needs a seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
        )
    scheduler = make_scheduler(model, config)
    scheduler.set_timesteps(config.steps, device=model.device)
    guided = config.guidance_scale > 1.0
    conditioning = encode_conditioning(model, prompts)
    if guided:
        negative = encode_conditioning(model, [config.negative_prompt], negative=True)
        conditioning = {
            name: torch.cat([negative[name].expand_as(rows), rows]) for name, rows in conditioning.items()
        }
    conditioning = {name: rows.to(model.dtype) for name, rows in conditioning.items()}
    generators = seeded_generators(seeds)
    latents_BCHW: Tensor = draw_noise(generators, _latent_shape(model, config)).to(model.device)
    latents_BCHW = latents_BCHW * scheduler.init_noise_sigma
    # Only schedulers that draw noise while denoising take generators; each sample draws from its own.
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if takes_generators else {}
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        input_BCHW = torch.cat([latents_BCHW, latents_BCHW]) if guided else latents_BCHW
        input_BCHW = scheduler.scale_model_input(input_BCHW, timestep).to(model.dtype)
        arguments = unet_arguments(conditioning, input_BCHW, model.vae_scale_factor)
        with autocast(model.device, config.precision):
            output_BCHW = model.unet(input_BCHW, timestep, **arguments).sample.float()
        if guided:
            free_BCHW, led_BCHW = output_BCHW.chunk(2)
            output_BCHW = free_BCHW + config.guidance_scale * (led_BCHW - free_BCHW)
        latents_BCHW = scheduler.step(output_BCHW, timestep, latents_BCHW, **step_options).prev_sample
        if progress is not None:
            progress(done, len(scheduler.timesteps))
    return latents_BCHW


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents_BCHW: Tensor, batch_size: int = 32) -> np.ndarray[Any, Any]:
    """Latents (as sampled, so times the scaling factor) to uint8 images_BHWC; as many at once as memory and
    `batch_size` allow."""
    scale_C11, shift_C11 = (part.to(latents_BCHW.device) for part in model.latent_scaling())
    factor = model.vae_scale_factor
    batch_size = vae_batch(batch_size, latents_BCHW.shape[2] * factor, latents_BCHW.shape[3] * factor)
    images = []
    for start in range(0, len(latents_BCHW), batch_size):
        part_BCHW = latents_BCHW[start : start + batch_size]
        part_BCHW = (part_BCHW / scale_C11 + shift_C11).to(model.device, model.vae_dtype)
        pixels_BCHW = model.vae.decode(part_BCHW).sample.float()
        pixels_BCHW = (pixels_BCHW / 2 + 0.5).clamp(0, 1).mul(255).round()
        images.append(
            pixels_BCHW.to(torch.uint8).permute(0, 2, 3, 1).cpu()
        )  # device-to-host sync, once a batch
    return torch.cat(images).contiguous().numpy()


def sample_images(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray[Any, Any]:
    """`sample_latents`, then `decode_latents`: uint8 images_BHWC. The same seeds give the same bytes."""
    return decode_latents(model, sample_latents(model, prompts, seeds, config, progress=progress))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic where that is safe, or none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _latent_shape(model: DiffusionModel, config: SamplerConfig) -> tuple[int, int, int]:
    height, width = (config.height or model.default_size[0], config.width or model.default_size[1])
    factor = model.vae_scale_factor
    if height % factor or width % factor:
        raise ConfigError(
            f"sampler: height and width must be multiples of {factor} pixels, got {height} x {width}"
        )
    return model.latent_channels, height // factor, width // factor
