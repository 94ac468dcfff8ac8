"""Captioned renders: what a web-scale image-text set is to a real model.

`captioned_renders` is a source for a recipe's `pretraining` and `reference` sections (see accord.captions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from accord.captions import CaptionedImage
from accord.config import Config
from accord.prompts import Grammar, load_grammar
from accord.shapes.scene import COUNTS, Scene, random_scene, render

LOOKALIKES: dict[str, str] = dict(
    pair
    for one, other in (
        *(("circle", "heart"), ("square", "cross"), ("triangle", "star")),
        *(("red", "orange"), ("blue", "purple"), ("green", "yellow")),
        *(("one", "two"), ("three", "four")),
        *(("in the sky", "in the snow"), ("on grass", "in the desert")),
    )
    for pair in ((one, other), (other, one))
)
"""The word that a careless writer puts for another. Nobody mistakes the night.

Errors are systematic, as on the web, and not spread evenly over all words, for a reason. Classifier-free
guidance draws p(x | z) (p(x | z) / p(x))^(w - 1), so with growing w the images for which the caption is
likeliest, argmax_x p(z | x). Were each wrong word as rare as the next, those would be the right images, and
guidance alone would undo the errors. Where an image of four is at least as likely to be called
"three" as one of three, it cannot.
"""


class CaptionNoise(Config):
    """How often a caption puts the look-alike of an attribute's word: why a base model needs aligning."""

    object: float = 0.0
    colour: float = 0.0
    count: float = 0.0
    background: float = 0.0


PRETRAINING_NOISE = CaptionNoise(object=0.03, colour=0.42, count=0.54, background=0.44)
"""Errors of the captions that the shipped diffusion model learned from."""
NAME_ALL = 0.4
"""Share of captions that name every attribute; the others name a random subset."""


def corrupt(scene: Scene, noise: CaptionNoise, rng: np.random.Generator) -> Scene:
    """The scene as a careless writer saw it: each attribute mistaken with its own probability."""
    wrong = {name: rng.random() < chance for name, chance in noise.model_dump().items()}
    words = {name: LOOKALIKES.get(word, word) if wrong[name] else word for name, word in scene.words.items()}
    return replace(scene, **{**words, "count": COUNTS.index(words["count"]) + 1})  # type: ignore[arg-type]


def caption(scene: Scene, grammar: Grammar, rng: np.random.Generator, *, name_all: float = NAME_ALL) -> str:
    """A caption in the grammar's words: all attributes, or a random subset of at least one."""
    named = [True, True, True]
    if rng.random() >= name_all:
        while True:
            named = [bool(bit) for bit in rng.integers(0, 2, size=3)]
            if any(named):
                break
    return grammar.text(
        scene.object,
        colour=scene.colour if named[0] else None,
        count=COUNTS[scene.count - 1] if named[1] else None,
        background=scene.background if named[2] else None,
    )


def captioned_renders(
    count: int, seed: int, noise: dict[str, float] | None = None, grammar: str = "shapes"
) -> Iterator[CaptionedImage]:
    """Draw `count` random scenes with captions.

    Args:
        noise: wrong values by attribute (CaptionNoise); by default those that the shipped model learned from.
    """
    rng = np.random.default_rng(seed)
    words = load_grammar(grammar)
    errors = PRETRAINING_NOISE if noise is None else CaptionNoise(**noise)
    for _ in range(count):
        scene = random_scene(rng)
        yield CaptionedImage(render(scene), caption(corrupt(scene, errors, rng), words, rng))
