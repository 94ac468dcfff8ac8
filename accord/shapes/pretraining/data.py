"""Scenes to train on, drawn once and kept in memory.

Legend: N scenes, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accord.config import Config
from accord.shapes.scene import Scene, random_scene, render

Log = Callable[[str], None]


class SceneConfig(Config):
    """How many scenes are drawn to train on, and from which seed."""

    count: int = 16_000
    seed: int = 1


@dataclass(frozen=True)
class SceneData:
    """Scenes and their renders, uint8."""

    scenes: list[Scene]
    images_NCHW: Tensor


def random_scenes(config: SceneConfig) -> list[Scene]:
    """`config.count` random scenes."""
    rng = np.random.default_rng(config.seed)
    return [random_scene(rng) for _ in range(config.count)]


def draw_scenes(config: SceneConfig) -> SceneData:
    """`random_scenes`, rendered."""
    scenes = random_scenes(config)
    images = np.stack([render(scene) for scene in scenes])
    return SceneData(scenes, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def to_float(images_NCHW: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], as diffusers' VAEs expect."""
    return images_NCHW.float() / 127.5 - 1.0


def random_flip(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half; every scene stays what it was."""
    flip_N = torch.rand(len(images_NCHW), generator=generator) < 0.5
    return torch.where(flip_N[:, None, None, None], images_NCHW.flip(-1), images_NCHW)


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))
