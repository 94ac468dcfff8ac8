"""Captioned images of a run: those of pre-training (the second term of Eq. 2), and the held-out ones to
compare with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from accord.artifacts import Manifest, read_manifest
from accord.captioned import CAPTIONED_KIND, read_captioned, read_captions, write_captioned
from accord.captions import open_source
from accord.errors import ConfigError
from accord.recipe import Recipe
from ray_jobs.stages import Stage, is_done, timed

Name = Literal["pretraining", "reference"]


def run(recipe: Recipe, run_dir: Path, name: Name) -> Manifest:
    """NAME/: what the recipe's source of that name gives, in the seconds of the stage that needs it."""
    config = recipe.pretraining if name == "pretraining" else recipe.reference
    if config is None:
        raise ConfigError(f"this stage needs the recipe's {name} images, but that section is null")
    seed = _seed(recipe.seed, name)
    stage = Stage(name, CAPTIONED_KIND, config.model_dump(mode="json"), seed)
    if not is_done(stage, run_dir):
        with timed(run_dir, name):
            images = open_source(config.source, config.count, seed, config.options)
            write_captioned(images, run_dir / name, inputs={}, config=stage.config, seed=seed)
    return read_manifest(run_dir / name)


def read(run_dir: Path, name: Name) -> tuple[list[bytes], list[str]]:
    """The PNG files and the captions of NAME/."""
    return read_captioned(run_dir / name)


def captions(run_dir: Path, name: Name) -> list[str]:
    """The captions alone of NAME/, whose images may be more than memory holds."""
    return read_captions(run_dir / name)


def _seed(seed: int, name: str) -> int:
    """Of its own for each source, so that the reference holds no image of pre-training."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big") >> 1
