"""The model that a recipe names, as far as its configs and the headers of its files tell."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.artifacts import PICKLE_SUFFIXES
from accord.config import resolve_path
from accord.diffusion.architectures import ARCHITECTURES, Architecture
from accord.diffusion.fit import PIPELINES, check_index
from accord.errors import ArtifactError

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True)
class Found:
    """A model's architecture, and what is wrong with its directory."""

    architecture: Architecture | None
    """None when not even the configs are there."""
    problems: tuple[str, ...]
    source: str
    """Where the architecture is from, for the reader."""


def find_model(uri: str, assumed: str | None = None) -> Found:
    """What the directory at `uri` holds; `assumed` names a published architecture to reckon with where it
    does not hold the configs."""
    directory = resolve_path(uri)
    problems: list[str] = []
    architecture: Architecture | None = None
    try:
        architecture = _read_configs(directory)
        problems += _weights_problems(directory, architecture)
    except ArtifactError as error:
        problems.append(str(error))
    if architecture is None and assumed is not None:
        return Found(ARCHITECTURES[assumed], tuple(problems), f"the published sizes of {assumed}")
    return Found(architecture, tuple(problems), str(directory))


def tensor_shapes(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a safetensors file, from its header alone. Raises ArtifactError."""
    try:
        with open(file, "rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > _HEADER_LIMIT:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(size))
        return {
            name: (str(entry["dtype"]), tuple(int(side) for side in entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {file}") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ArtifactError(f"{file} is no whole safetensors file: {error}") from None


def count_tensors(directory: Path) -> tuple[int, int]:
    """How many numbers the directory's safetensors hold, and their bytes."""
    numbers = size = 0
    for file in sorted(directory.rglob("*.safetensors")):
        for kind, shape in tensor_shapes(file).values():
            count = 1
            for side in shape:
                count *= side
            numbers += count
            size += count * _BYTES.get(kind, 1)
    return numbers, size


def _read_configs(directory: Path) -> Architecture:
    index = _read_json(directory / "model_index.json")
    check_index(index, directory / "model_index.json")
    names = [name for name in PIPELINES[index["_class_name"]] if _is_network(name)]
    return {name: _public(_read_json(directory / name / "config.json")) for name in names}


def _is_network(name: str) -> bool:
    return name in ("unet", "vae") or name.startswith("text_encoder")


def _weights_problems(directory: Path, architecture: Architecture) -> list[str]:
    """Weights that are missing, or not those of the configs; pickles."""
    from accord.doctor.simulate import parameters

    problems = [
        f"{path} is in a pickle format ({path.suffix}); expected *.safetensors only"
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in PICKLE_SUFFIXES
    ]
    expected = parameters(architecture)
    for name in architecture:
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        files = [
            file
            for file in sorted((directory / name).glob("*.safetensors"))
            if file.stem == stem or file.stem.startswith(f"{stem}-0")  # in one file, or in numbered parts
        ]
        if not files:
            problems.append(f"{directory / name} has no {stem}.safetensors: the weights are missing")
            continue
        shapes = {key: shape for file in files for key, (_, shape) in tensor_shapes(file).items()}
        found = sum(_count(shape) for key, shape in shapes.items() if not key.endswith("position_ids"))
        if found != expected[name]:
            problems.append(
                f"{directory / name}: config.json describes {expected[name]:,} numbers, but the weights are "
                f"{found:,}: they are not of one model"
            )
    return problems


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {file}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: expected a JSON object ({error})") from None


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without what the libraries note for themselves."""
    unwanted = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in unwanted}
