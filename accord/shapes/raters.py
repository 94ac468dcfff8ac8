"""Simulated raters: the rule-based judge, seen through people who make mistakes.

Each rater has an error rate, skips some of what cannot be read, and compares sets of images for alignment
(how many of them fit) and for fidelity (how close they are to real renders, in the evaluator's features). All
that a rater says is determined by the rater, the key of the question and the seed of the panel.

Legend: H W pixels, D features, M reference renders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from accord.config import Config
from accord.evaluation.protocols import Question, Vote
from accord.prompts import Prompt
from accord.shapes.judge import fits, read_image
from accord.shapes.scene import random_scene, render

if TYPE_CHECKING:  # torch, of which single images need nothing
    from accord.shapes.evaluator import ShapesEvaluator

Image = NDArray[np.uint8]


class Rater(Config):
    """A simulated person."""

    name: str
    error_rate: float
    """How often a good/bad verdict, or a preference between two sets, comes out wrong."""
    skip_rate: float = 0.25
    """How often an unreadable image is skipped rather than called bad."""
    blur: float = 0.5
    """Noise on the perceived distance to real images, in standard deviations of real images' own."""


RATERS = tuple(
    Rater(name=name, error_rate=error)
    for name, error in (
        ("ada", 0.02),
        ("ben", 0.03),
        ("chloe", 0.03),
        ("dev", 0.04),
        ("edith", 0.05),
        ("femi", 0.05),
        ("grace", 0.06),
        ("hugo", 0.08),
        ("iris", 0.10),
    )
)
NEIGHBOURS = 5
REFERENCE_COUNT, REFERENCE_SEED = 600, 5_005
INDIFFERENCE = 0.15
"""Below this difference in mean distance (in the same units as `Rater.blur`) a rater sees no difference."""


class SimulatedPanel:
    """Panel of the sandbox (Panel and KnowsTheTruth of accord.evaluation.protocols)."""

    def __init__(self, seed: int = 0, raters: Sequence[Rater] = RATERS) -> None:
        self.seed = seed
        self.members = tuple(raters)

    @property
    def raters(self) -> Sequence[str]:
        """The raters' names."""
        return [rater.name for rater in self.members]

    def judge(
        self,
        images: Sequence[Image],
        prompts: Sequence[Prompt],
        keys: Sequence[str],
        judgements_per_image: int,
    ) -> list[list[Vote]]:
        """For each image, the votes of `judgements_per_image` different raters, chosen by its key."""
        votes = []
        for image, prompt, key in zip(images, prompts, keys, strict=True):
            reading = read_image(image)
            good = fits(reading, prompt)
            order = self._rng(key, "assignment").permutation(len(self.members))[:judgements_per_image]
            votes.append([self._verdict(self.members[i], good, reading.readable, key) for i in sorted(order)])
        return votes

    def truth(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> list[bool]:
        """Whether each image fits its prompt: what a rater would say who makes no mistakes."""
        return [fits(read_image(image), prompt) for image, prompt in zip(images, prompts, strict=True)]

    def compare(
        self, question: Question, prompt: Prompt, first: Sequence[Image], second: Sequence[Image], key: str
    ) -> list[int]:
        """One vote a rater: +1 for the first set, -1 for the second, 0 for no preference."""
        if question == "alignment":
            sides = [[fits(read_image(image), prompt) for image in side] for side in (first, second)]
            return [self._prefer_aligned(rater, sides, key) for rater in self.members]
        gap = float(np.mean(self._distance(second)) - np.mean(self._distance(first)))
        return [self._prefer_clean(rater, gap, len(first), key) for rater in self.members]

    def _rng(self, *parts: str) -> np.random.Generator:
        digest = hashlib.sha256("\0".join([str(self.seed), *parts]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def _verdict(self, rater: Rater, good: bool, readable: bool, key: str) -> Vote:
        rng = self._rng(key, rater.name)
        if not readable and rng.random() < rater.skip_rate:
            return Vote(rater.name, "skip")
        wrong = rng.random() < rater.error_rate
        return Vote(rater.name, "good" if good != wrong else "bad")

    def _prefer_aligned(self, rater: Rater, sides: Sequence[Sequence[bool]], key: str) -> int:
        rng = self._rng(key, rater.name, "alignment")
        seen = [sum(good != (rng.random() < rater.error_rate) for good in side) for side in sides]
        return int(np.sign(seen[0] - seen[1]))

    def _prefer_clean(self, rater: Rater, gap: float, images: int, key: str) -> int:
        rng = self._rng(key, rater.name, "fidelity")
        # Each side's mean distance is perceived with the noise of a mean over its images.
        perceived = gap / self._spread + rng.normal() * rater.blur * np.sqrt(2.0 / images)
        if abs(perceived) < INDIFFERENCE:
            return 0
        wrong = rng.random() < rater.error_rate
        return int(np.sign(perceived)) * (-1 if wrong else 1)

    @cached_property
    def _evaluator(self) -> ShapesEvaluator:
        from accord.shapes.evaluator import ShapesEvaluator

        return ShapesEvaluator()

    @cached_property
    def _reference_features(self) -> NDArray[np.float32]:
        """Features of real renders, made here: no image of an evaluation is among them."""
        rng = np.random.default_rng(REFERENCE_SEED)
        return self._evaluator.read(np.stack([render(random_scene(rng)) for _ in range(REFERENCE_COUNT)]))[0]

    @cached_property
    def _spread(self) -> float:
        """Standard deviation of fresh renders' own distances: the unit in which differences are seen."""
        rng = np.random.default_rng(REFERENCE_SEED + 1)
        fresh = [render(random_scene(rng)) for _ in range(200)]
        return float(np.std(self._distance(fresh)))

    def _distance(self, images: Sequence[Image]) -> NDArray[np.float64]:
        """Mean distance of each image to its nearest real renders, in the evaluator's features."""
        features = self._evaluator.read(np.stack(images))[0].astype(np.float64)
        squared = ((features[:, None] - self._reference_features[None].astype(np.float64)) ** 2).sum(-1)
        nearest = np.sort(squared, axis=1)[:, :NEIGHBOURS]
        return np.asarray(np.sqrt(nearest).mean(axis=1))


def panel(seed: int = 0) -> SimulatedPanel:
    """The factory that recipes name."""
    return SimulatedPanel(seed)
