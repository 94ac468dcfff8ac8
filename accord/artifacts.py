"""Artifacts: directories with a manifest of what they hold and what made it, written whole or not at all.

Weights and tensors are safetensors only: a pickle runs code when it is opened.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

import accord
from accord.config import Config
from accord.disk import open_to_readers, storage_errors, sync, temporary_file, write_file
from accord.errors import ArtifactError

if TYPE_CHECKING:  # torch takes seconds to import, and most of what needs an artifact needs no tensor
    import torch

__all__ = [
    "MANIFEST_NAME",
    "PICKLE_SUFFIXES",
    "Manifest",
    "artifact_writer",
    "canonical_json",
    "check_model_directory",
    "code_version",
    "content_digest",
    "each_tensor",
    "load_tensors",
    "read_manifest",
    "save_tensors",
    "sha256_bytes",
    "sha256_file",
    "storage_errors",
    "verify",
    "write_file",
]

MANIFEST_NAME = "manifest.json"
# Formats that are pickles, or may be.
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_HASH_BLOCK_BYTES = 1 << 20


class Manifest(Config):
    """What an artifact holds and where it is from.

    `digest` is of kind and files alone: the same content has the same digest, whoever made it, and whenever.
    """

    kind: str
    files: dict[str, str]  # relative path, with "/" -> sha256
    inputs: dict[str, str]  # name -> digest of an artifact that went in
    config: dict[str, Any]
    seed: int
    code_version: str
    digest: str


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """JSON with one spelling: keys sorted, no blanks, no NaN. Configs and paths become plain values."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
    )


def content_digest(kind: str, files: Mapping[str, str]) -> str:
    """The digest of an artifact of `kind` that holds `files` (relative path -> sha256)."""
    return sha256_bytes(canonical_json({"kind": kind, "files": dict(files)}).encode())


@contextlib.contextmanager
def artifact_writer(
    directory: str | Path,
    kind: str,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | pydantic.BaseModel,
    seed: int,
) -> Iterator[Path]:
    """Yields a temporary directory, which becomes `directory`, with a manifest, if the block ends well.

    An older artifact at `directory` is replaced. When the block fails nothing is changed and nothing is left.
    One writer at a time: the remains of a killed writer of the same directory are cleared away.

    Raises:
        StorageError: when the disk is full.
    """
    directory = Path(directory)
    with storage_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
        try:
            yield temporary
            _write_manifest(temporary, kind, inputs, config, seed)
            _replace_directory(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an artifact. Its files are not looked at: see `verify`.

    Raises:
        ArtifactError: when there is none, it is damaged, or its digest is not that of its files.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is no artifact: it has no {MANIFEST_NAME}") from None
    except (OSError, pydantic.ValidationError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if manifest.digest != content_digest(manifest.kind, manifest.files):
        raise ArtifactError(f"{path} was changed by hand: its digest is not that of the files that it lists")
    return manifest


def verify(directory: str | Path, kind: str | None = None) -> Manifest:
    """Check an artifact against its manifest: every file present and unchanged, no unlisted pickle.

    Raises:
        ArtifactError: naming the first file that is wrong, or another kind than `kind`.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{directory} is a {manifest.kind!r}; expected a {kind!r}")
    for name, expected in manifest.files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{directory / MANIFEST_NAME} lists {name!r}, which is outside the artifact")
        if not path.is_file():
            raise ArtifactError(f"{directory} is incomplete: {name} is missing; make or copy it anew")
        if sha256_file(path) != expected:
            raise ArtifactError(f"{path} was changed or damaged: its SHA-256 is not that of the manifest")
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if path.suffix.lower() in PICKLE_SUFFIXES and name not in manifest.files:
            raise ArtifactError(f"{path} is not in the manifest, and its format can run code; remove it")
    return manifest


def save_tensors(
    path: str | Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, all or nothing; the same tensors and metadata give the same bytes.

    Raises:
        StorageError: when the disk is full.
    """
    from safetensors.torch import save_file

    path = Path(path)
    with storage_errors(path), temporary_file(path) as temporary:
        save_file(_alone(tensors), temporary, metadata=dict(metadata) if metadata else None)
        _sort_header(temporary)


def load_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """Read a safetensors file onto the CPU.

    Raises:
        ArtifactError: missing, truncated, another format, or with a number that is not finite.
    """
    return dict(each_tensor(path))


def each_tensor(path: str | Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """What `load_tensors` reads, one at a time, so that a file larger than memory can be read."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    raise ArtifactError(f"{path}: the tensor {name!r} holds NaN or infinity; refused")
                yield name, tensor
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        message = f"{path} is no whole safetensors file (truncated, or another format): {error}"
        raise ArtifactError(message) from None


def check_model_directory(directory: str | Path) -> None:
    """Refuse a model directory that is not safe to load: pickled weights, damaged files, NaN or infinity.

    Raises:
        ArtifactError: naming the file, and the tensor where there is one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"there is no model directory {directory}")
    weights = []
    for path in _files(directory):
        suffix = path.suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise ArtifactError(
                f"{path} is in a pickle format ({suffix}), which can run code when it is loaded; expected "
                "*.safetensors only: convert it, or remove it if the same weights lie beside it"
            )
        if suffix == ".safetensors":
            weights.append(path)
    if not weights:
        raise ArtifactError(f"{directory} holds no *.safetensors: it is no model directory")
    for path in weights:
        for _ in each_tensor(path):  # one tensor at a time: a model may be larger than memory
            pass


@functools.cache
def code_version() -> str:
    """The package's version, with the git commit when it runs from a checkout: "0.1.0+g1a2b3c4"."""
    root = Path(accord.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return accord.__version__
    try:
        commit = _git(root, "rev-parse", "--short=7", "HEAD")
        dirty = "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.SubprocessError):
        return accord.__version__
    return f"{accord.__version__}+g{commit}{dirty}"


def _write_manifest(
    directory: Path,
    kind: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | pydantic.BaseModel,
    seed: int,
) -> None:
    files = {path.relative_to(directory).as_posix(): sha256_file(path) for path in _files(directory)}
    files.pop(MANIFEST_NAME, None)
    manifest = Manifest(
        kind=kind,
        files=files,
        inputs=dict(inputs),
        config=json.loads(canonical_json(config)),
        seed=seed,
        code_version=code_version(),
        digest=content_digest(kind, files),
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _replace_directory(temporary: Path, directory: Path) -> None:
    for path in _files(temporary):
        sync(path)
    for folder, _, _ in os.walk(temporary):
        sync(Path(folder))
    open_to_readers(temporary, 0o777)
    aside = _aside(directory)
    if directory.exists():
        directory.rename(aside)
    try:
        temporary.rename(directory)
    except BaseException:
        if aside.exists():
            aside.rename(directory)
        raise
    sync(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(directory: Path) -> None:
    """Put right what a writer left that was killed: before, or between, the two renames."""
    aside = _aside(directory)
    if aside.exists():
        if directory.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(directory)
    for remains in directory.parent.glob(f".{directory.name}.partial-*"):
        shutil.rmtree(remains, ignore_errors=True)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _alone(tensors: Mapping[str, "torch.Tensor"]) -> "dict[str, torch.Tensor]":
    """On the CPU, each in a memory of its own, as safetensors wants it; copied only if it is not so yet."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    for name, tensor in plain.items():
        storage = tensor.untyped_storage()
        if uses[storage.data_ptr()] > 1 or storage.nbytes() != tensor.nbytes:
            plain[name] = tensor.clone()
    return plain


def _sort_header(path: Path) -> None:
    """Spell the header in one order: the library writes metadata in the order of a hash map."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _plain(value: object) -> object:
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
