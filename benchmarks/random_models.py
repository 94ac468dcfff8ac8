"""Published architectures with random weights, as pipeline directories: real sizes, nobody's weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTokenizer

from accord.diffusion.architectures import ARCHITECTURES, SD15
from accord.doctor.simulate import build

HALF_WIDTH = {**SD15, "unet": {**SD15["unet"], "block_out_channels": [160, 320, 640, 640]}}
MODELS = {**ARCHITECTURES, "sd15-half": HALF_WIDTH}
"""sd15-half: SD 1.5 with a UNet of half its width, which can be trained in full where memory is short."""
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_random_model(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A directory of the architecture `name`, unless it is there already."""
    if (directory / "model_index.json").is_file():
        return directory
    architecture = MODELS[name]
    networks = {part: _random(build_empty(architecture, part), dtype) for part in architecture}
    tokenizer = clip_tokenizer(directory.with_name(f"{directory.name}-tokenizer"))
    pipeline_class: Any
    scheduler_class: Any = EulerDiscreteScheduler if name == "sdxl" else DPMSolverMultistepScheduler
    if name == "sdxl":
        pipeline_class = StableDiffusionXLPipeline
        pipeline = pipeline_class(
            **networks,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=scheduler_class(**_SCHEDULE),
            add_watermarker=False,
        )
    else:
        pipeline_class = StableDiffusionPipeline
        pipeline = pipeline_class(
            **networks,
            tokenizer=tokenizer,
            scheduler=scheduler_class(**_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    partial = directory.with_name(f"{directory.name}.partial")
    pipeline.save_pretrained(partial, safe_serialization=True)
    partial.rename(directory)
    return directory


def build_empty(architecture: Any, part: str) -> Any:
    """On the meta device, so that its own slow way of drawing weights is not taken."""
    with torch.device("meta"):
        return build(architecture, part)


def clip_tokenizer(directory: Path) -> Any:
    """CLIP's own, from the byte pairs that open_clip ships."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    return CLIPTokenizer.from_pretrained(directory)


def _random(network: Any, dtype: torch.dtype) -> Any:
    """Weights that keep activations in bounds: small noise in matrices, ones in norms, zeros in biases."""
    buffers = {name: buffer.shape for name, buffer in network.named_buffers()}
    network = nn.Module.to(network, dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim >= 2:
                tensor.normal_(std=0.02, generator=generator)
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, shape in buffers.items():  # positions: 0, 1, 2 ...
            network.get_buffer(name).copy_(torch.arange(shape[-1]).expand(shape))
    return network
