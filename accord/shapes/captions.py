"""Captioned renders: what a web-scale image-text set is to a real model.

`captioned_renders` is a source for a recipe's `pretraining` and `reference` sections (see accord.captions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from accord.captions import CaptionedImage
from accord.config import Config
from accord.prompts import Grammar, load_grammar
from accord.shapes.scene import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, Scene, random_scene, render

T = TypeVar("T")


class CaptionNoise(Config):
    """How often a caption names a wrong value, by attribute: the reason why a base model needs aligning."""

    object: float = 0.0
    colour: float = 0.0
    count: float = 0.0
    background: float = 0.0


PRETRAINING_NOISE = CaptionNoise(object=0.03, colour=0.35, count=0.55, background=0.35)
"""Errors of the captions that the shipped diffusion model learned from."""
NAME_ALL = 0.4
"""Share of captions that name every attribute; the others name a random subset."""


def _other(values: tuple[T, ...], current: T, rng: np.random.Generator) -> T:
    choices = [value for value in values if value != current]
    return choices[int(rng.integers(len(choices)))]


def corrupt(scene: Scene, noise: CaptionNoise, rng: np.random.Generator) -> Scene:
    """The scene as a careless writer saw it: each attribute wrong with its own probability."""
    changes: dict[str, str | int] = {}
    if rng.random() < noise.object:
        changes["object"] = _other(OBJECTS, scene.object, rng)
    if rng.random() < noise.colour:
        changes["colour"] = _other(tuple(COLOURS), scene.colour, rng)
    if rng.random() < noise.count:
        changes["count"] = _other(tuple(range(1, len(COUNTS) + 1)), scene.count, rng)
    if rng.random() < noise.background:
        changes["background"] = _other(tuple(BACKGROUNDS), scene.background, rng)
    return replace(scene, **changes)  # type: ignore[arg-type]


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
