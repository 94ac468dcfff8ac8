"""What the stages share: the models that a recipe names, their digests, images by digest, and the panel."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from accord.artifacts import MANIFEST_NAME, content_digest, read_manifest, sha256_file
from accord.config import load_object, resolve_path
from accord.errors import ArtifactError, ConfigError
from accord.images import ImageFolder
from accord.recipe import Recipe
from ray_jobs.generation import Source

IMAGES = "images"
T = TypeVar("T")
_CHECKPOINT_SCHEME = "open_clip:"


def base_model(recipe: Recipe) -> Source:
    """The recipe's base model."""
    directory = resolve_path(recipe.model).resolve()
    return Source(directory, digest_of(directory, "diffusion_model"))


def clip_digest(recipe: Recipe) -> str:
    """A digest of the recipe's CLIP."""
    if recipe.clip.startswith(_CHECKPOINT_SCHEME):
        return sha256_file(Path(recipe.clip.removeprefix(_CHECKPOINT_SCHEME).partition("/")[2]).absolute())
    from accord.reward.features import clip_path  # open_clip takes seconds to import

    return digest_of(clip_path(recipe.clip), "clip")


def digest_of(directory: Path, kind: str) -> str:
    """As of its manifest if there is one, else made of its files in the same way.

    Whoever loads the model checks its files against the manifest; here it is enough to know which model is
    meant.
    """
    if not directory.is_dir():
        raise ArtifactError(
            f"there is no directory {directory}; the recipe names it as its {kind.replace('_', ' ')}"
        )
    if (directory / MANIFEST_NAME).is_file():
        return read_manifest(directory).digest
    files = {
        path.relative_to(directory).as_posix(): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    return content_digest(kind, files)


def image_folder(run_dir: Path) -> ImageFolder:
    """All generated images of a run."""
    return ImageFolder(run_dir / IMAGES)


def batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` of what comes one by one."""
    waiting = iter(items)
    while part := list(itertools.islice(waiting, size)):
        yield part


def load_images(folder: ImageFolder, digests: Sequence[str]) -> NDArray[np.uint8]:
    """uint8 RGB images, BHWC; all of one size."""
    return np.stack([folder.load(digest) for digest in digests])


def make_panel(recipe: Recipe, purpose: str) -> Any:
    """The recipe's simulated raters. Raises ConfigError when it has none, saying what needs them."""
    if recipe.panel is None:
        raise ConfigError(f"{purpose} needs raters, but the recipe's panel is null")
    return load_object(recipe.panel)(seed=recipe.seed)


def make_evaluator(recipe: Recipe) -> Any:
    """The recipe's evaluator. Raises ConfigError when it has none."""
    if recipe.evaluator is None:
        raise ConfigError("evaluate needs something that measures images, but the recipe's evaluator is null")
    return load_object(recipe.evaluator)(seed=recipe.seed)


def records(table: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table, with columns as attributes (whose types pandas cannot know)."""
    yield from table.itertuples()
