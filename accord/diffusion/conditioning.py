"""What a prompt means to a UNet: Stable Diffusion's text states, and what SDXL adds to them.

Shapes: K prompts, B samples, T text tokens, D text width, P width of the pooled text, H W of latents.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accord.diffusion.model import DiffusionModel

logger = logging.getLogger(__name__)

Conditioning = Mapping[str, Tensor]
"""Tensors by name: "states" (T, D) and, of SDXL, "pooled" (P,), of one prompt or, with a dimension before
those, of several. Whoever stacks, indexes or moves them does so by name and does not look inside."""


@torch.no_grad()
def encode_conditioning(
    model: DiffusionModel, prompts: Sequence[str], *, negative: bool = False, batch_size: int = 64
) -> dict[str, Tensor]:
    """The prompts as the model's own pipeline passes them to the UNet: states_KTD and, of SDXL, pooled_KP,
    one row a prompt, in the given order, on the model's device. A prompt that occurs again is encoded once.

    `negative`: they are what guidance leads away from, or what training without a prompt sees; the empty one
    is then zeros in a model that asks for it (SDXL's force_zeros_for_empty_prompt). A prompt longer than the
    tokenizer's limit is cut there, with a warning, as diffusers does.
    """
    unique = list(dict.fromkeys(prompts))
    row = {prompt: i for i, prompt in enumerate(unique)}
    order = [row[prompt] for prompt in prompts]
    parts = []
    for start in range(0, len(unique), batch_size):
        part = unique[start : start + batch_size]
        encoded = _encode_xl(model, part) if model.is_xl else _encode(model, part)
        if negative and model.zero_empty_prompt:
            kept = torch.tensor([bool(prompt) for prompt in part], device=model.device)
            encoded = {
                name: torch.where(kept.view(-1, *[1] * (rows.ndim - 1)), rows, torch.zeros_like(rows))
                for name, rows in encoded.items()
            }
        parts.append(encoded)
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def unet_arguments(
    conditioning: Conditioning, latents_BCHW: Tensor, pixels_per_latent: int
) -> dict[str, Any]:
    """The conditioning of a batch as keyword arguments of diffusers' UNet.

    SDXL is told the size of the picture too: as in its pipeline, and as in fine-tuning, one that was neither
    scaled nor cropped. Made on the device, so that nothing waits for it.
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": conditioning["states"]}
    if "pooled" in conditioning:
        count, _, height, width = latents_BCHW.shape
        # original height and width, top and left of the crop, target height and width
        sizes = [height, width, 0, 0, height, width]
        columns = [
            torch.full((count, 1), float(size * pixels_per_latent), device=latents_BCHW.device)
            for size in sizes
        ]
        arguments["added_cond_kwargs"] = {
            "text_embeds": conditioning["pooled"],
            "time_ids": torch.cat(columns, dim=1),
        }
    return arguments


def _encode(model: DiffusionModel, prompts: list[str]) -> dict[str, Tensor]:
    ids_KT, mask_KT = _tokens(model.tokenizer, prompts)
    uses_mask = getattr(model.text_encoder.config, "use_attention_mask", False)
    mask = mask_KT.to(model.device) if uses_mask else None
    return {"states": model.text_encoder(ids_KT.to(model.device), attention_mask=mask)[0]}


def _encode_xl(model: DiffusionModel, prompts: list[str]) -> dict[str, Tensor]:
    """Both encoders' last states but one, side by side, and the second's projected summary."""
    states = []
    pooled_KP = torch.zeros(0)
    encoders = ((model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2))
    for number, (tokenizer, encoder) in enumerate(encoders):
        ids_KT, _ = _tokens(tokenizer, prompts, warn=number == 0)
        output = encoder(ids_KT.to(model.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled_KP = output[0]  # of the last: its text_embeds
    return {"states": torch.cat(states, dim=-1), "pooled": pooled_KP}


def _tokens(tokenizer: Any, prompts: list[str], *, warn: bool = True) -> tuple[Tensor, Tensor]:
    """ids_KT and mask_KT, padded to the tokenizer's limit and cut there."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    for prompt, length in zip(prompts, map(len, tokenizer(prompts).input_ids), strict=True):
        if warn and length > limit:
            logger.warning("prompt cut at %d of its %d tokens: %r", limit, length, prompt)
    return tokens.input_ids, tokens.attention_mask
