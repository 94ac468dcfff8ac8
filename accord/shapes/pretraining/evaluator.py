"""Trains the sandbox's evaluator CNN on renders, some spoiled as generated images are.

Legend: B batch, C channels, H W pixels, A attributes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accord.config import Config
from accord.shapes.evaluator import AttributeReader
from accord.shapes.pretraining.data import Log, SceneData, cosine, random_flip, to_float
from accord.shapes.scene import ATTRIBUTES, OBJECTS, Scene, render

UNKNOWN = -100
"""A label that is not asked for."""


class EvaluatorConfig(Config):
    """Optimisation of the evaluator."""

    scenes: int = 8_000
    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 2e-3
    junk_share: float = 0.12
    blob_share: float = 0.15
    mixed_share: float = 0.08
    seed: int = 3


def attribute_labels(scenes: list[Scene]) -> Tensor:
    """Class indices (N, A) in ATTRIBUTES' order; 0 is 'none of these', so the first known value is 1."""
    rows = [[1 + values.index(scene.words[name]) for name, values in ATTRIBUTES.items()] for scene in scenes]
    return torch.tensor(rows)


def _degrade(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the images a little and add faint noise: a reader of generated images must bear both."""
    blurred = F.avg_pool2d(F.pad(images_BCHW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pick_B = torch.rand(len(images_BCHW), generator=generator)[:, None, None, None]
    noise = 0.06 * torch.randn(images_BCHW.shape, generator=generator)
    return torch.where(pick_B < 0.5, 0.5 * (images_BCHW + blurred), images_BCHW) + noise


def _junk(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Images with nothing definite on them: two scenes averaged, or one in shuffled tiles."""
    mixed = 0.5 * (images_BCHW + images_BCHW.roll(1, 0))
    tiles = images_BCHW.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)
    tiles = tiles[:, :, torch.randperm(16, generator=generator)]
    shuffled = (
        tiles.reshape(*tiles.shape[:2], 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(images_BCHW.shape)
    )
    pick_B = torch.rand(len(images_BCHW), generator=generator)[:, None, None, None]
    return torch.where(pick_B < 0.5, mixed, shuffled)


def _warp(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Bend images until the shapes are blobs, by smooth random displacements of three to six pixels."""
    size = images_BCHW.shape[-1]
    strength_B = 0.5 + 0.5 * torch.rand(len(images_BCHW), generator=generator)
    coarse = torch.randn(len(images_BCHW), 2, 9, 9, generator=generator) * (12.0 / size)
    coarse = coarse * strength_B[:, None, None, None]
    field_BHW2 = F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    axis = torch.linspace(-1, 1, size)
    grid_HW2 = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return F.grid_sample(images_BCHW, grid_HW2 + field_BHW2, padding_mode="border", align_corners=True)


def _hybrid(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Scenes with one kind of object on the left and another on the right of a cut through the objects."""
    images = []
    for scene in scenes:
        others = [name for name in OBJECTS if name != scene.object]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        image, second = render(scene), render(replace(scene, object=other))
        cut = int(np.median(np.nonzero((image != second).any(axis=2))[1]))
        image[:, cut:] = second[:, cut:]
        images.append(torch.from_numpy(image))
    return to_float(torch.stack(images).permute(0, 3, 1, 2))


def spoil(
    images_BCHW: Tensor,
    labels_BA: Tensor,
    scenes: list[Scene],
    config: EvaluatorConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Make the first of a batch what generated images can be: junk, blobs, mixed kinds of objects.

    Junk shows nothing definite; a blob or a mixture has no kind of object, but a colour and a background.
    What cannot be said is not asked (UNKNOWN).
    """
    images, labels = images_BCHW.clone(), labels_BA.clone()
    shares = (config.junk_share, config.blob_share, config.mixed_share)
    junk, blobs, mixed = (int(share * len(images)) for share in shares)
    names = list(ATTRIBUTES)
    images[:junk] = _junk(images_BCHW[:junk], generator)
    labels[:junk] = 0
    labels[:junk, names.index("background")] = UNKNOWN  # junk may well lie on a plain background
    images[junk : junk + blobs] = _warp(images_BCHW[junk : junk + blobs], generator)
    if mixed:
        chosen = slice(junk + blobs, junk + blobs + mixed)
        images[chosen] = _hybrid(scenes[chosen], generator)
    labels[junk : junk + blobs + mixed, names.index("object")] = 0
    labels[junk : junk + blobs + mixed, names.index("count")] = UNKNOWN  # halves and blobs may touch
    return images, labels


def train_evaluator(data: SceneData, config: EvaluatorConfig, log: Log) -> AttributeReader:
    """Cross-entropy on all four attributes, where they can be said."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    reader = AttributeReader().train()
    labels_NA = attribute_labels(data.scenes)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, config.steps)
        index_B = torch.randint(len(data.scenes), (config.batch_size,), generator=generator)
        images = random_flip(to_float(data.images_NCHW[index_B]), generator)
        scenes = [data.scenes[i] for i in index_B.tolist()]
        images, labels_BA = spoil(images, labels_NA[index_B], scenes, config, generator)
        _, logits = reader(_degrade(images, generator))
        losses = [
            F.cross_entropy(logits[name], labels_BA[:, a], ignore_index=UNKNOWN)
            for a, name in enumerate(ATTRIBUTES)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 0:
            log(f"evaluator {step}/{config.steps} loss {loss.item():.4f}")
    return reader.eval().requires_grad_(False)
