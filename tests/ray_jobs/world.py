"""A world small enough for tests of the whole loop: flat pictures, an evaluator and raters that read their
colour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from accord.captions import CaptionedImage
from accord.evaluation.protocols import Measurement, Vote
from accord.guards.measures import saturation
from accord.prompts import load_grammar

SIZE = 64


def captioned(count: int, seed: int) -> Iterator[CaptionedImage]:
    """Flat pictures of a random colour with random captions."""
    prompts = load_grammar("shapes").all_prompts()
    generator = np.random.default_rng(seed)
    for _ in range(count):
        image = np.full((SIZE, SIZE, 3), generator.integers(0, 256, 3), dtype=np.uint8)
        yield CaptionedImage(image, prompts[generator.integers(len(prompts))].text)


class MeanEvaluator:
    """Success depends on the mean colour; the features are the means of the four quarters."""

    feature_name = "mean colours"

    def measure(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[Any]) -> Measurement:
        pixels = np.asarray(images_BHWC, dtype=np.float32) / 255
        size = pixels.shape[0]
        quarters = pixels.reshape(size, 2, SIZE // 2, 2, SIZE // 2, 3).mean(axis=(2, 4)).reshape(size, 12)
        bit = (pixels.mean(axis=(1, 2, 3)) * 1000).astype(int) % 2 == 0
        return Measurement(bit, np.ones(size, dtype=bool), quarters)


class HashPanel:
    """Votes by the digest of the key, so that both verdicts occur."""

    raters = tuple(f"rater {n}" for n in range(9))

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def judge(
        self, images: Sequence[Any], prompts: Sequence[Any], keys: Sequence[str], judgements_per_image: int
    ) -> list[list[Vote]]:
        names = self.raters[:judgements_per_image]
        return [[Vote(name, "good" if bit(self.seed, key) else "bad") for name in names] for key in keys]

    def compare(
        self, kind: str, prompt: Any, first: Sequence[Any], second: Sequence[Any], key: str
    ) -> list[int]:
        return [1 if bit(self.seed, f"{kind} {key} {rater}") else -1 for rater in self.raters]


def bit(seed: int, key: str) -> int:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()[0] % 2


def evaluator(seed: int) -> MeanEvaluator:
    return MeanEvaluator()


def panel(seed: int) -> HashPanel:
    return HashPanel(seed)


def write_recipe(directory: Path, model: Path, clip: Path) -> Path:
    """A recipe of this world whose every stage takes seconds."""
    one = {"count": 1, "colour": 1, "background": 1, "combination": 1}
    splits = {
        split: {"colour": 1, "combination": 1} for split in ("seen", "unseen_combination", "unseen_object")
    }
    sampler = {"steps": 2, "guidance_scale": 2.0}
    content = {
        "name": "tiny",
        "seed": 1,
        "run_dir": str(directory / "run"),
        "grammar": "shapes",
        "model": str(model),
        "clip": str(clip),
        "evaluator": "tests.ray_jobs.world:evaluator",
        "panel": "tests.ray_jobs.world:panel",
        "pretraining": {"source": "tests.ray_jobs.world:captioned", "count": 12},
        "reference": {"source": "tests.ray_jobs.world:captioned", "count": 20},
        "collect": {
            "labelled": {
                "prompts": {"count": 2, "colour": 2},
                "images_per_prompt": {"count": 4, "colour": 4},
            },
            "unlabelled": {"prompts": {"background": 1}, "images_per_prompt": {"background": 4}},
            "sampler": sampler,
            "batch_size": 4,
        },
        "reward": {
            "hidden_size": 8,
            "steps": 6,
            "batch_size": 6,
            "num_prompts": 3,
            "log_every": 2,
            "checkpoint_every": 2,
            "validation_fraction": 0.2,
        },
        "finetune": {
            "steps": 4,
            "batch_size": 4,
            "pretraining_batch_size": 4,
            "log_every": 1,
            "checkpoint_every": 2,
            "learning_rate": 1e-3,
        },
        "evaluate": {
            "guidance_scales": [1.0, 2.0],
            "choice": {"prompts": {"seen": one}, "images_per_prompt": 2},
            "test": {"prompts": splits, "images_per_prompt": 2},
            "best_of": {"prompts": {"seen": {"colour": 1}}, "candidates": 4, "sizes": [1, 4]},
            "sampler": sampler,
            "batch_size": 4,
            "bootstrap_resamples": 100,
        },
        "ray": {"num_cpus": 2, "generators": 1},
        "tracking": {"uri": ""},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def greenness() -> Any:
    """A held-out judge: how green an image is."""
    return lambda images_BHWC, prompts: np.asarray(images_BHWC, dtype=float)[..., 1].mean(axis=(1, 2)) / 255


def faithfulness() -> Any:
    """A held-out judge that likes an image the less, the more it differs from the first that it saw there."""
    first: list[NDArray[np.uint8]] = []

    def judge(images_BHWC: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64]:
        first.append(images_BHWC)
        gap = np.abs(images_BHWC.astype(float) - first[0].astype(float))
        return np.asarray(-gap.mean(axis=(1, 2, 3)) / 255)

    return judge


class Saturated:
    """A scorer that loves saturation."""

    def score(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(saturation(np.stack(list(images))))


def saturated() -> Saturated:
    return Saturated()
