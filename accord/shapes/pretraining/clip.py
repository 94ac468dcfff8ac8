"""Trains the sandbox's CLIP from nothing, on renders and on their reconstructions by the autoencoder.

Half of each batch are hard negatives: scenes that share two words, so that their captions differ in few.

Legend: B batch, C channels, H W pixels, T tokens, D embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.config import Config
from accord.prompts import Grammar
from accord.shapes.captions import CaptionNoise, caption, corrupt
from accord.shapes.pretraining.data import Log, SceneData, cosine, random_flip
from accord.shapes.pretraining.tokenizer import CONTEXT_LENGTH, write_tokenizer
from accord.shapes.scene import ATTRIBUTES, random_scene, render

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class ClipConfig(Config):
    """Sizes, caption noise and optimisation of CLIP."""

    steps: int = 1_600
    batch_size: int = 96
    group_size: int = 6
    learning_rate: float = 1e-3
    embed_dim: int = 256
    noise: CaptionNoise = CaptionNoise(colour=0.2, count=0.3, background=0.2)
    """Like the diffusion model's, but milder: a CLIP that read all captions rightly would need no reward."""
    seed: int = 4


def write_architecture(directory: Path, grammar: Grammar, config: ClipConfig) -> None:
    """Write what `open_clip.create_model("local-dir:...")` needs beside the weights."""
    vocabulary_size = write_tokenizer(directory, grammar)
    model = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "local",
            "tokenizer_kwargs": {"clean": "whitespace"},
        },
    }
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2)
    (directory / "open_clip_config.json").write_text(text + "\n")


HARD_NEGATIVES = (("object", "colour"), ("colour", "count"))
"""What the scenes of a group share, in turn: their captions differ in count and background, or in object and
background. Colours are told apart without help."""


class _Groups:
    """Makes the first half of a batch into groups of scenes that share two words."""

    def __init__(self, data: SceneData, size: int) -> None:
        self.words, self.size = [scene.words for scene in data.scenes], size
        self.alike: list[dict[tuple[str, ...], list[int]]] = []
        for names in HARD_NEGATIVES:
            members: dict[tuple[str, ...], list[int]] = {}
            for i, words in enumerate(self.words):
                members.setdefault(tuple(words[name] for name in names), []).append(i)
            self.alike.append(members)

    def __call__(self, index_B: Tensor) -> Tensor:
        """Each group's scenes replaced by scenes that share two words with its first."""
        out, half = index_B.clone(), len(index_B) // 2
        for number, start in enumerate(range(0, half, self.size)):
            kind = number % len(HARD_NEGATIVES)
            first = self.words[int(index_B[start])]
            alike = self.alike[kind][tuple(first[name] for name in HARD_NEGATIVES[kind])]
            for i in range(start + 1, min(start + self.size, half)):
                out[i] = alike[int(index_B[i]) % len(alike)]
        return out


def train_clip(
    data: SceneData,
    reconstruct: Callable[[Tensor], Tensor],
    grammar: Grammar,
    directory: Path,
    config: ClipConfig,
    log: Log,
) -> Any:
    """Symmetric contrastive loss; pairs with the same caption are no negatives of each other.

    Args:
        reconstruct: uint8 images through the autoencoder and back, as generated images look.
        directory: where the architecture and tokenizer are written.
    """
    write_architecture(directory, grammar, config)
    torch.manual_seed(config.seed)
    name = f"local-dir:{directory}"
    model: Any = open_clip.create_model(name, precision="fp32", device="cpu", load_weights=False).train()
    model = model.to(memory_format=torch.channels_last)  # a fifth faster on CPUs
    tokenize: Any = open_clip.get_tokenizer(name)
    generator = torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    group = _Groups(data, config.group_size)
    redrawn_NCHW = reconstruct(data.images_NCHW)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, config.steps)
        index_B = torch.randint(len(data.scenes), (config.batch_size,), generator=generator)
        index_B = group(index_B)
        images = random_flip((data.images_NCHW, redrawn_NCHW)[step % 2][index_B], generator)
        texts = [
            caption(corrupt(data.scenes[i], config.noise, rng), grammar, rng, name_all=0.6)
            for i in index_B.tolist()
        ]
        image_BD = F.normalize(model.encode_image((images.float() / 255.0 - mean) / std), dim=-1)
        text_BD = F.normalize(model.encode_text(tokenize(texts)), dim=-1)
        logits_BB = model.logit_scale.exp().clamp(max=100.0) * image_BD @ text_BD.T
        loss = _contrastive(logits_BB, texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            log(f"clip {step}/{config.steps} loss {loss.item():.4f}")
    return model.eval().requires_grad_(False)


def _contrastive(logits_BB: Tensor, texts: list[str]) -> Tensor:
    """InfoNCE in both directions (Radford et al. 2021), duplicates of a caption left out of its negatives."""
    same_BB = torch.tensor([[a == b for b in texts] for a in texts]) & ~torch.eye(
        len(texts), dtype=torch.bool
    )
    masked = logits_BB.masked_fill(same_BB, -torch.inf)
    target_B = torch.arange(len(texts))
    return 0.5 * (F.cross_entropy(masked, target_B) + F.cross_entropy(masked.T, target_B))


@torch.no_grad()
def zero_shot(
    model: Any, directory: Path, grammar: Grammar, count: int = 400, seed: int = 77
) -> dict[str, float]:
    """Accuracy on fresh renders of choosing the right word of each attribute, the others named rightly."""
    tokenize: Any = open_clip.get_tokenizer(f"local-dir:{directory}")
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    image_ND = F.normalize(model.encode_image((pixels.float() / 255.0 - mean) / std), dim=-1)
    accuracy = {}
    for name, values in ATTRIBUTES.items():
        right = 0
        for scene, image_D in zip(scenes, image_ND, strict=True):
            texts = [grammar.text(**{**scene.words, name: value}) for value in values]
            text_KD = F.normalize(model.encode_text(tokenize(texts)), dim=-1)
            right += values[int((text_KD @ image_D).argmax())] == scene.words[name]
        accuracy[name] = right / count
    return accuracy
