"""What an evaluation needs from a world: what measures images, and people (or stand-ins) who judge them.

Shapes: B images, R raters, H W pixels, C = 3 channels RGB, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from accord.prompts import Prompt

Question = Literal["alignment", "fidelity"]
QUESTIONS: tuple[Question, ...] = ("alignment", "fidelity")
"""Which set of images fits the prompt better; which looks better, whatever the prompt."""

Verdict = Literal["good", "bad", "skip"]


@dataclass(frozen=True)
class Measurement:
    """What an evaluator says of B images."""

    success_B: NDArray[np.bool_]
    """The image fits its prompt."""
    readable_B: NDArray[np.bool_]
    """The image shows something definite, fitting or not."""
    features_BD: NDArray[np.float32]
    """For Fréchet distance, KID and diversity."""


@dataclass(frozen=True)
class Vote:
    """One rater's judgement of one image."""

    rater: str
    verdict: Verdict


@runtime_checkable
class Evaluator(Protocol):
    """Measures images. Independent of the raters: it never makes a label that anything is trained on."""

    @property
    def feature_name(self) -> str:
        """What the features are, as the report names them."""

    def measure(self, images_BHWC: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Measurement:
        """Each image against its own prompt. Deterministic, and the same whatever the batch."""


@runtime_checkable
class Panel(Protocol):
    """Raters who judge images, and compare sets of images. All they say is determined by the keys."""

    @property
    def raters(self) -> Sequence[str]:
        """The names of the R raters."""

    def judge(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[Prompt],
        keys: Sequence[str],
        judgements_per_image: int,
    ) -> list[list[Vote]]:
        """For each image (HWC), the votes of that many different raters."""

    def compare(
        self,
        question: Question,
        prompt: Prompt,
        first: Sequence[NDArray[np.uint8]],
        second: Sequence[NDArray[np.uint8]],
        key: str,
    ) -> list[int]:
        """One vote a rater: +1 where the rater prefers the first set of images, -1 the second, 0 neither."""


@runtime_checkable
class KnowsTheTruth(Protocol):
    """A panel of simulated raters can also say what is true: what a rater would say who makes no mistakes."""

    def truth(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[Prompt]) -> list[bool]:
        """Whether each image (HWC) fits its prompt."""
