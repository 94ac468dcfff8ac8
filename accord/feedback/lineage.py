"""From a rater to everything that his judgements went into: snapshots, rewards, models, reports."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from accord.artifacts import MANIFEST_NAME, Manifest, read_manifest
from accord.errors import ArtifactError
from accord.feedback.snapshot import (
    RATERS_NAME,
    SNAPSHOT_KIND,
    load_snapshot_comparisons,
    load_snapshot_raters,
)


@dataclasses.dataclass(frozen=True)
class Affected:
    """An artifact that a rater's judgements went into.

    `because` says how: a snapshot of so many judgements of his, or the inputs that are affected.
    """

    path: Path
    kind: str
    digest: str
    because: str


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What is affected, makers before what was made of them; and what could not be read or told, and why."""

    affected: tuple[Affected, ...]
    unknown: tuple[tuple[Path, str], ...]


def affected_by(rater: str, runs_dir: str | Path) -> Lineage:
    """Every artifact under `runs_dir` that the rater's judgements went into, found by the digests it cites.

    Raises:
        ArtifactError: there is no such directory.
    """
    root = Path(runs_dir)
    if not root.is_dir():
        raise ArtifactError(f"there is no directory {root} to look for artifacts in")
    unknown: list[tuple[Path, str]] = []
    manifests: list[tuple[Path, Manifest]] = []
    for path in _artifact_directories(root):
        try:
            manifests.append((path, read_manifest(path)))
        except ArtifactError as error:
            unknown.append((path, str(error)))
    found: dict[Path, Affected] = {}
    for path, manifest in manifests:
        if manifest.kind == SNAPSHOT_KIND:
            number = _judgements_of(rater, path, manifest, unknown)
            if number:
                because = f"{number} of its judgements are from {rater}"
                found[path] = Affected(path, manifest.kind, manifest.digest, because)
    _follow(manifests, found)
    return Lineage(tuple(found.values()), tuple(unknown))


def _artifact_directories(root: Path) -> Iterator[Path]:
    for manifest in sorted(root.rglob(MANIFEST_NAME)):
        if not any(part.startswith(".") for part in manifest.relative_to(root).parts):
            yield manifest.parent


def _judgements_of(rater: str, path: Path, manifest: Manifest, unknown: list[tuple[Path, str]]) -> int:
    if RATERS_NAME not in manifest.files:
        unknown.append((path, "a snapshot of a version that did not note raters"))
        return 0
    try:
        raters = load_snapshot_raters(path)
        compared = sum(item.rater == rater for item in load_snapshot_comparisons(path))
    except ArtifactError as error:
        unknown.append((path, str(error)))
        return 0
    return int(raters.loc[raters["rater"] == rater, "judgements"].sum()) + compared


def _follow(manifests: list[tuple[Path, Manifest]], found: dict[Path, Affected]) -> None:
    """Adds what was made of what is found, until nothing more is found."""
    grown = True
    while grown:
        grown = False
        digests = {item.digest for item in found.values()}
        for path, manifest in manifests:
            names = sorted(name for name, digest in manifest.inputs.items() if digest in digests)
            if names and path not in found:
                because = f"made from its {', '.join(names)}"
                found[path] = Affected(path, manifest.kind, manifest.digest, because)
                grown = True
