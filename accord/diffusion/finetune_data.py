"""What fine-tuning learns from, encoded once (encode.py), and the checks that say early what would fail late.

Shapes: N generated images, M pre-training images, C latent channels, H W latent height and width, K prompts,
T text tokens, D text width, P width of the pooled text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.artifacts import sha256_bytes
from accord.diffusion.model import DiffusionModel
from accord.errors import ConfigError, FeedbackError


@dataclass(frozen=True)
class FinetuneData:
    """Everything encoded once (encode.py), on any device, latents in any float type."""

    latents_NCHW: Tensor
    text_index_N: Tensor  # rows of text_KTD
    reward_N: Tensor
    pretraining_latents_MCHW: Tensor
    pretraining_text_index_M: Tensor
    pretraining_reward_M: Tensor  # of each image for its caption; read only if a threshold asks for it
    text_KTD: Tensor
    empty_text_TD: Tensor  # of the empty prompt, for condition dropout: what guidance leads away from
    pooled_KP: Tensor | None = None  # of SDXL only, as the next
    empty_pooled_P: Tensor | None = None

    def conditioning(self) -> dict[str, Tensor]:
        """What the prompts mean, by name (conditioning.py), one row a prompt."""
        return {"states": self.text_KTD} | ({} if self.pooled_KP is None else {"pooled": self.pooled_KP})

    def empty(self) -> dict[str, Tensor]:
        """The same of no prompt, without a dimension of prompts."""
        pooled = {} if self.empty_pooled_P is None else {"pooled": self.empty_pooled_P}
        return {"states": self.empty_text_TD} | pooled

    def fingerprint(self) -> str:
        """A digest of rewards, captions and sizes (not of the latents, which may be many gigabytes)."""
        parts = [
            str([tuple(t.shape) for t in (self.latents_NCHW, self.pretraining_latents_MCHW, self.text_KTD)])
        ]
        for tensor in (
            self.text_index_N,
            self.reward_N.float(),
            self.pretraining_text_index_M,
            self.pretraining_reward_M.float(),
        ):
            parts.append(sha256_bytes(tensor.cpu().contiguous().numpy().tobytes()))
        return sha256_bytes(" ".join(parts).encode())


def check_data(
    model: DiffusionModel, data: FinetuneData, num_model: int, num_pretraining: int, world_size: int
) -> None:
    """Says early and plainly what would fail late and darkly.

    `num_model` and `num_pretraining` are the images of a step's batch over all `world_size` workers. Raises
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
    used: list[tuple[str, Tensor, Tensor]] = []
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
