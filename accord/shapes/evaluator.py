"""The sandbox's independent evaluator: a small CNN trained on renders, which never labels anything.

It reads the same four attributes as the judge, by learned features instead of rules. Its last hidden layer
gives the features for Frechet distance, KID, diversity, and the raters' eye for fidelity.

Legend: B batch, C channels, H W pixels, D features.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from accord.artifacts import load_tensors
from accord.config import resolve_path
from accord.evaluation.protocols import Measurement
from accord.prompts import Prompt
from accord.shapes.scene import ATTRIBUTES

WEIGHTS = "pkg://accord.shapes/weights/evaluator"
FEATURES = 64


class AttributeReader(nn.Module):
    """Four convolutions, then a linear head an attribute, whose first class is 'none of these'."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 3 * width, 4 * width]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in itertools.pairwise(sizes)
        )
        self.project = nn.Linear(4 * width * 16, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, 1 + len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] to features (B, D) and logits by attribute."""
        hidden = images_BCHW
        for block in self.blocks:
            hidden = F.max_pool2d(block(hidden), 2)
        features_BD = self.project(hidden.flatten(1))
        return features_BD, {name: head(F.silu(features_BD)) for name, head in self.heads.items()}


def load_reader(directory: str | Path = WEIGHTS) -> AttributeReader:
    """Load the CNN's weights (safetensors) from a directory."""
    path = resolve_path(directory)
    reader = AttributeReader(**json.loads((path / "config.json").read_text()))
    reader.load_state_dict({k: v.float() for k, v in load_tensors(path / "evaluator.safetensors").items()})
    return reader.eval().requires_grad_(False)


class ShapesEvaluator:
    """Evaluator of the sandbox (accord.evaluation.protocols.Evaluator)."""

    feature_name = "64-d penultimate layer of the shapes evaluator CNN"

    def __init__(self, directory: str | Path = WEIGHTS) -> None:
        self.reader = load_reader(directory)

    @torch.no_grad()
    def read(self, images_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], dict[str, list[str | None]]]:
        """Features (B, D) and, by attribute, the name read in each image (None: none of the known)."""
        features, classes = [], []
        pixels_BCHW = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
        for part in torch.split(pixels_BCHW, 128):
            features_BD, logits = self.reader(part.float() / 127.5 - 1.0)
            features.append(features_BD)
            classes.append(torch.stack([logits[name].argmax(1) for name in ATTRIBUTES], dim=1))
        best_BA = torch.cat(classes).tolist()
        names = {
            name: [None if row[a] == 0 else values[row[a] - 1] for row in best_BA]
            for a, (name, values) in enumerate(ATTRIBUTES.items())
        }
        return torch.cat(features).numpy().astype(np.float32), names

    def measure(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Measurement:
        """Whether each image shows its prompt, whether it is readable at all, and its features.

        Readable: the network recognises an object, a colour and a count, whatever they are.
        """
        features_BD, names = self.read(images_BHWC)
        readable = [
            all(names[a][i] is not None for a in ("object", "colour", "count")) for i in range(len(prompts))
        ]
        success = [
            readable[i] and all(names[a][i] == word for a, word in prompt.meaning.items())
            for i, prompt in enumerate(prompts)
        ]
        return Measurement(np.array(success, dtype=bool), np.array(readable, dtype=bool), features_BD)


def evaluator(seed: int = 0) -> ShapesEvaluator:
    """The factory that recipes name; there is nothing random in it."""
    return ShapesEvaluator()
