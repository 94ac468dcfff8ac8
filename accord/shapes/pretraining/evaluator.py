"""Trains the sandbox's evaluator CNN on renders, some blurred or noisy as generated images are, and on junk.

Legend: B batch, C channels, H W pixels, A attributes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.config import Config
from accord.shapes.evaluator import AttributeReader
from accord.shapes.pretraining.data import Log, SceneData, cosine, random_flip, to_float
from accord.shapes.scene import ATTRIBUTES, Scene


class EvaluatorConfig(Config):
    """Optimisation of the evaluator."""

    scenes: int = 8_000
    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 2e-3
    junk_share: float = 0.15
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
    mixed = 0.5 * (images_BCHW + images_BCHW.flip(0))
    tiles = images_BCHW.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)
    tiles = tiles[:, :, torch.randperm(16, generator=generator)]
    shuffled = (
        tiles.reshape(*tiles.shape[:2], 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(images_BCHW.shape)
    )
    pick_B = torch.rand(len(images_BCHW), generator=generator)[:, None, None, None]
    return torch.where(pick_B < 0.5, mixed, shuffled)


def train_evaluator(data: SceneData, config: EvaluatorConfig, log: Log) -> AttributeReader:
    """Cross-entropy on all four attributes; junk has the class 'none' for all but the background."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    reader = AttributeReader().train()
    labels_NA = attribute_labels(data.scenes)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    num_junk = int(config.junk_share * config.batch_size)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, config.steps)
        index_B = torch.randint(len(data.scenes), (config.batch_size,), generator=generator)
        images = random_flip(to_float(data.images_NCHW[index_B]), generator)
        labels_BA = labels_NA[index_B].clone()
        images = torch.cat([_junk(images[:num_junk], generator), images[num_junk:]])
        labels_BA[:num_junk] = 0
        _, logits = reader(_degrade(images, generator))
        weight_B = torch.ones(config.batch_size)
        losses = []
        for a, name in enumerate(ATTRIBUTES):
            # A junk image's background may well be plain, so nothing is asked of it there.
            known_B = (
                weight_B if name != "background" else (torch.arange(config.batch_size) >= num_junk).float()
            )
            losses.append((F.cross_entropy(logits[name], labels_BA[:, a], reduction="none") * known_B).mean())
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 0:
            log(f"evaluator {step}/{config.steps} loss {loss.item():.4f}")
    return reader.eval().requires_grad_(False)
