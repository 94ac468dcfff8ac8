"""What the denoising engine needs of a model, and how a Stable Diffusion gives it.

Shapes: B samples, C latent channels, H W height and width (of latents or pixels).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from accord.diffusion.conditioning import Conditioning, encode_conditioning, unet_arguments
from accord.diffusion.model import DiffusionModel
from accord.diffusion.sample import decode_latents, make_scheduler
from accord.diffusion.settings import SamplerConfig

__all__ = ["Conditioning", "ModelAdapter", "Pixels", "StableDiffusionAdapter", "adapter_for", "compile_unet"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""A uint8 RGB image_HWC, or images_BHWC."""


@runtime_checkable
class ModelAdapter(Protocol):
    """A text-to-image model, as the engine sees it. Calls come from two threads: `decode` from one, the rest
    from the other (`scheduler` from any)."""

    latent_channels: int
    pixels_per_latent: int
    """Height and width in pixels of a cell of the latents."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the networks."""

    def scheduler(self, name: str) -> Any:
        """A fresh scheduler of a class of diffusers. Raises ConfigError when there is none such."""

    def encode(self, prompt: str, *, negative: bool) -> Conditioning:
        """What the prompt means, without a batch dimension; `negative` when it is what guidance leads away
        from. The engine stacks those of a batch by name and hands them to `denoise`."""

    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output_BCHW in float32; `conditioning` with a batch dimension."""

    def decode(self, latents_BCHW: Tensor) -> Pixels:
        """images_BHWC, uint8 RGB."""


class StableDiffusionAdapter:
    """Stable Diffusion 1, 2 and XL, and whatever else is in the format of their pipelines."""

    def __init__(self, model: DiffusionModel, *, compiled: bool = False) -> None:
        self.model = model
        self.latent_channels = model.latent_channels
        self.pixels_per_latent = model.vae_scale_factor
        self._unet = compile_unet(model.unet) if compiled else model.unet

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device, dtype)

    def scheduler(self, name: str) -> Any:
        return make_scheduler(self.model, SamplerConfig(scheduler=name))

    def encode(self, prompt: str, *, negative: bool) -> Conditioning:
        # One prompt a call: its embedding must not depend on which others are new at that moment.
        encoded = encode_conditioning(self.model, [prompt], negative=negative)
        return {name: rows[0].to(self.model.dtype) for name, rows in encoded.items()}

    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        output_BCHW: Tensor = self._unet(
            latents_BCHW.to(self.model.dtype),
            timesteps_B,
            **unet_arguments(conditioning, latents_BCHW, self.pixels_per_latent),
            return_dict=False,
        )[0]
        return output_BCHW.float()

    def decode(self, latents_BCHW: Tensor) -> Pixels:
        return decode_latents(self.model, latents_BCHW, batch_size=len(latents_BCHW))


def adapter_for(model: DiffusionModel | ModelAdapter, *, compiled: bool = False) -> ModelAdapter:
    """The adapter of a model; an adapter is its own."""
    if isinstance(model, DiffusionModel):
        return StableDiffusionAdapter(model, compiled=compiled)
    return model


def compile_unet(unet: Any) -> Any:
    """The UNet compiled for each shape that it meets: the engine's buckets, and few sizes of image."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    # A shape more than this would silently run uncompiled.
    settings.recompile_limit = max(settings.recompile_limit, 64)
    return torch.compile(unet, dynamic=False)
