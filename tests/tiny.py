"""Random-weight models, small enough for unit tests, in the real formats; made from a fixed seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = (
    *("one", "two", "three", "four", "red", "green", "blue", "yellow", "purple", "orange"),
    *("circle", "circles", "square", "squares", "triangle", "triangles", "star", "stars", "heart", "hearts"),
    *("cross", "crosses", "in", "the", "sky", "on", "grass", "desert", "at", "night", "snow"),
)


def tiny_tokenizer(directory: Path, max_length: int = 24) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer: every byte, and each of WORDS. EOS has the highest id, as CLIP's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merges: list[str] = []
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merged = pieces[0] + pieces[1]
            if merged not in tokens:
                tokens.append(merged)
                merges.append(f"{pieces[0]} {pieces[1]}")
            pieces = [merged, *pieces[2:]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": max_length,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    return CLIPTokenizer.from_pretrained(directory)


def tiny_diffusion_directory(
    tmp: Path,
    *,
    channels: Sequence[int] = (16, 32),
    text_width: int = 32,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    unet_options: dict[str, Any] | None = None,
    vae_options: dict[str, Any] | None = None,
    max_length: int = 24,
) -> Path:
    """A StableDiffusionPipeline directory: 64x64 pixels, 8x8x4 latents, about 1 MB in its default size."""
    torch.manual_seed(0)
    cross = "CrossAttn"
    down = [f"{cross}DownBlock2D"] * (len(channels) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + [f"{cross}UpBlock2D"] * (len(channels) - 1)
    options = {"layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8, **(unet_options or {})}
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=text_width,
        **options,
    )
    vae = _tiny_vae(vae_options or {})
    tokenizer = tiny_tokenizer(Path(tmp) / "tiny_tokenizer", max_length)
    text_encoder = CLIPTextModel(_tiny_text_config(tokenizer, text_width))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    directory = Path(tmp) / "tiny_diffusion"
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def tiny_xl_directory(
    tmp: Path,
    *,
    prediction_type: str = "epsilon",
    zero_empty_prompt: bool = True,
    vae_options: dict[str, Any] | None = None,
) -> Path:
    """A StableDiffusionXLPipeline directory of the same sizes: two text encoders of unlike widths."""
    torch.manual_seed(1)
    widths, pooled, sizes = (16, 32), 24, 8
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes,
        projection_class_embeddings_input_dim=6 * sizes + pooled,
    )
    tokenizer = tiny_tokenizer(Path(tmp) / "tiny_tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=_tiny_vae(vae_options or {}),
        text_encoder=CLIPTextModel(_tiny_text_config(tokenizer, widths[0])),
        text_encoder_2=CLIPTextModelWithProjection(_tiny_text_config(tokenizer, widths[1], pooled)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type=prediction_type,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=zero_empty_prompt,
        add_watermarker=False,
    )
    directory = Path(tmp) / "tiny_xl"
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def _tiny_vae(options: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **{"layers_per_block": 1, "norm_num_groups": 8, "mid_block_add_attention": False, **options},
    )


def _tiny_text_config(tokenizer: Any, width: int, pooled: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=pooled or width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sd15_shaped_directory(tmp: Path) -> Path:
    """Stable Diffusion 1.5's architecture (UNet and VAE: the same tensor names) at a tenth of its width."""
    return tiny_diffusion_directory(
        tmp,
        channels=(32, 64, 128, 128),
        text_width=48,
        unet_options={"layers_per_block": 2, "attention_head_dim": 8, "norm_num_groups": 32},
        vae_options={"layers_per_block": 2, "mid_block_add_attention": True},
        max_length=77,
    )
