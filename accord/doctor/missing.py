"""What a recipe names and is not there: files, sources, raters, a database. Nothing is made or changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from accord.captions import open_source
from accord.config import load_object, redact_url, resolve_path
from accord.doctor.sizes import count_tensors
from accord.errors import AccordError
from accord.recipe import Recipe, SourceConfig
from accord.reward.features import CHECKPOINT_SCHEME, CONFIG_NAME, HUB_SCHEME, HUB_VARIABLE

CONNECT_TIMEOUT_S = 5
VIT_L_14_BYTES, VIT_L_14_WIDTH = 427_616_513 * 4, 1024


@dataclass(frozen=True)
class Clip:
    """The size of a CLIP in float32, and the width of its image tower."""

    bytes: int
    width: int


def missing_parts(recipe: Recipe, run_dir: Path) -> list[str]:
    """One line for each thing that would stop the run, with what to do."""
    found: list[str] = []
    checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("clip", lambda: _clip(recipe)),
        ("pretraining", lambda: _source(recipe.pretraining)),
        ("reference", lambda: _source(recipe.reference)),
        ("evaluator", lambda: _object(recipe.evaluator)),
        ("panel", lambda: _object(recipe.panel)),
        ("feedback.url", lambda: _database(recipe.feedback_url(run_dir))),
        ("tracking.uri", lambda: _known(recipe.tracking_uri(run_dir))),
        ("run_dir", lambda: _writable(run_dir)),
    ]
    for key, check in checks:
        try:
            found += [f"{key}: {problem}" for problem in check()]
        except (AccordError, OSError) as error:
            found.append(f"{key}: {error}")
    return found


def clip_weights(recipe: Recipe) -> Clip:
    """From the headers of the recipe's CLIP; those of ViT-L-14 where it is not there."""
    try:
        if recipe.clip.startswith(CHECKPOINT_SCHEME):
            file = Path(recipe.clip.removeprefix(CHECKPOINT_SCHEME).partition("/")[2])
            return Clip(count_tensors(Path("/") / file.parent)[0] * 4, VIT_L_14_WIDTH)
        directory = resolve_path(recipe.clip)
        numbers, _ = count_tensors(directory)
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        width = int(config["model_cfg"]["vision_cfg"].get("width", VIT_L_14_WIDTH))
    except (AccordError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return Clip(VIT_L_14_BYTES, VIT_L_14_WIDTH)
    return Clip(numbers * 4, width) if numbers else Clip(VIT_L_14_BYTES, VIT_L_14_WIDTH)


def _clip(recipe: Recipe) -> Iterator[str]:
    if recipe.clip.startswith(CHECKPOINT_SCHEME):
        _, _, path = recipe.clip.removeprefix(CHECKPOINT_SCHEME).partition("/")
        if not Path("/", path).is_file():
            yield f"there is no checkpoint /{path}"
        return
    if recipe.clip.startswith(HUB_SCHEME):
        if os.environ.get(HUB_VARIABLE) != "1":
            yield f"{recipe.clip} is to be fetched from the hub, which {HUB_VARIABLE}=1 would allow"
        return
    directory = resolve_path(recipe.clip)
    if not directory.is_dir():
        yield f"there is no directory {directory}"
    elif not (directory / CONFIG_NAME).is_file():
        yield f"{directory} has no {CONFIG_NAME}, so it is no open_clip directory"
    elif not list(directory.glob("*.safetensors")):
        yield f"{directory} holds no *.safetensors: the weights are missing"


def _source(config: SourceConfig | None) -> Iterator[str]:
    if config is not None:
        open_source(config.source, config.count, 0, config.options)  # says what is wrong with it at once
    return iter(())


def _object(spec: str | None) -> Iterator[str]:
    if spec is not None:
        load_object(spec)
    return iter(())


def _known(value: str) -> Iterator[str]:
    """Reading it has raised, where it is to come from an environment that lacks it."""
    return iter(())


def _database(url: str) -> Iterator[str]:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if parsed.database and parsed.database != ":memory:":
                yield from _writable(Path(parsed.database).parent)
            return
        options = {"connect_timeout": CONNECT_TIMEOUT_S}
        engine = sqlalchemy.create_engine(parsed, connect_args=options, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
    except (SQLAlchemyError, ImportError) as error:
        first_line = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()[0]
        yield f"{redact_url(url)} does not answer: {redact_url(first_line)}"


def _writable(directory: Path) -> Iterator[str]:
    present = directory.resolve()
    while not present.exists():
        present = present.parent
    if not present.is_dir() or not os.access(present, os.W_OK):
        yield f"{directory} cannot be written: {present} is no directory of ours to write to"
