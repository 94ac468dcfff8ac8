"""Lineage: from a model back to the judgements that shaped it, and from anything forward to its models.

Every artifact's manifest names the digests of its inputs, so run directories are a graph; nothing else is
kept.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord.artifacts import MANIFEST_NAME, Manifest, read_manifest
from accord.errors import ArtifactError

# Directories below a run that hold no artifact of a finished stage, but many files.
_SKIPPED = frozenset({"images", "train", "features", "stages"})
_SHOWN = 12  # digits of a digest


@dataclass(frozen=True)
class Step:
    """One artifact on a walk: `name` is what the artifact next to it calls it, `depth` its distance from the
    start. `manifest` is None for an input that is in none of the directories, such as a CLIP.
    """

    depth: int
    name: str
    digest: str
    path: Path | None
    manifest: Manifest | None

    def __str__(self) -> str:
        kind = self.manifest.kind.replace("_", " ") if self.manifest else "not in these directories"
        where = f"  {self.path}" if self.path else ""
        return f"{'  ' * self.depth}{self.name} {self.digest[:_SHOWN]} ({kind}){where}"


@dataclass(frozen=True)
class Lineage:
    """All artifacts below some directories, by digest."""

    artifacts: Mapping[str, tuple[Path, Manifest]]
    users: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """digest -> (name under which it went in, digest of what was made from it)"""

    @classmethod
    def scan(cls, roots: Iterable[str | Path]) -> "Lineage":
        """Reads every manifest below `roots`. Damaged ones are errors: a walk must not end there unsaid.

        Raises:
            ArtifactError: a root that is not there, or a damaged manifest.
        """
        artifacts: dict[str, tuple[Path, Manifest]] = {}
        users: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for root in roots:
            for directory in _artifact_directories(Path(root).expanduser()):
                manifest = read_manifest(directory)
                artifacts.setdefault(manifest.digest, (directory, manifest))
                for name, digest in manifest.inputs.items():
                    users[digest].add((name, manifest.digest))
        return cls(artifacts, {digest: tuple(sorted(found)) for digest, found in users.items()})

    def find(self, prefix: str) -> str:
        """The full digest of the artifact, or of the input of one, whose digest begins with `prefix`.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        known = {*self.artifacts, *self.users}
        found = sorted(digest for digest in known if digest.startswith(prefix))
        if len(found) == 1:
            return found[0]
        if not found or not prefix:
            raise ArtifactError(
                f"no artifact with a digest that begins with {prefix[:64]!r} among the "
                f"{len(self.artifacts)} in these "
                "run directories; name further ones with --runs"
            )
        raise ArtifactError(
            f"{len(found)} artifacts have a digest that begins with {prefix!r} "
            f"({', '.join(digest[:_SHOWN] for digest in found[:3])}, ...); give more digits"
        )

    def back(self, digest: str) -> list[Step]:
        """The artifact itself and all that it was made from, each before its own inputs, each once."""
        return list(self._walk(digest, self._inputs))

    def forward(self, digest: str) -> list[Step]:
        """The artifact itself and all that was made from it, each before its own users, each once."""
        return list(self._walk(digest, self._made))

    def _walk(self, start: str, following: Any) -> Iterator[Step]:
        seen: set[str] = set()
        waiting = [(0, self._own_name(start), start)]
        while waiting:
            depth, name, digest = waiting.pop()
            if digest in seen:
                continue
            seen.add(digest)
            path, manifest = self.artifacts.get(digest, (None, None))
            yield Step(depth, name, digest, path, manifest)
            waiting += [(depth + 1, *pair) for pair in sorted(following(digest), reverse=True)]

    def _own_name(self, digest: str) -> str:
        path, _ = self.artifacts.get(digest, (None, None))
        if path is not None:
            return path.name
        return self.users[digest][0][0] if digest in self.users else "artifact"

    def _inputs(self, digest: str) -> list[tuple[str, str]]:
        _, manifest = self.artifacts.get(digest, (None, None))
        return list(manifest.inputs.items()) if manifest else []

    def _made(self, digest: str) -> list[tuple[str, str]]:
        return [(self.artifacts[user][0].name, user) for _, user in self.users.get(digest, ())]


def judgements_by_rater(snapshot: str | Path) -> dict[str, int]:
    """How many judgements of each rater are in a snapshot; empty for one of a version that did not note it.

    Raises:
        ArtifactError: the snapshot is damaged.
    """
    from accord.feedback.snapshot import RATERS_NAME, load_snapshot_raters

    if RATERS_NAME not in read_manifest(snapshot).files:
        return {}
    raters = load_snapshot_raters(snapshot)
    return {str(name): int(n) for name, n in zip(raters["rater"], raters["judgements"], strict=True)}


def image_models(path: str | Path) -> dict[str, str]:
    """{"model": digest, "reward": digest} of a served image's manifest: a JSON file, or a PNG that holds it
    as
    text under the key `accord`.

    Raises:
        ArtifactError: the file holds no such manifest.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".png":
            from PIL import Image

            with Image.open(path) as image:
                text = str(getattr(image, "text", {}).get("accord", ""))
        else:
            text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        found = found.get("manifest", found)
        digests = {
            name: found.get(snake) or found.get(camel)
            for name, snake, camel in (
                ("model", "model_digest", "modelDigest"),
                ("reward", "reward_model_digest", "rewardModelDigest"),
            )
        }
    except (OSError, ValueError, AttributeError):
        digests = {}
    if not digests.get("model"):
        raise ArtifactError(
            f"{path} holds no manifest of a served image; expected JSON with model_digest, or a PNG that "
            "Accord "
            "served (with text under the key 'accord')"
        )
    return {name: str(digest) for name, digest in digests.items() if digest}


def _artifact_directories(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise ArtifactError(f"there is no directory {root} to look for runs in")
    seen: set[str] = set()  # the arms of a study share artifacts through links
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(name for name in names if name not in _SKIPPED and not name.startswith("."))
        if os.path.realpath(folder) in seen:
            names.clear()
            continue
        seen.add(os.path.realpath(folder))
        if MANIFEST_NAME in files:
            yield Path(folder)
            if folder != str(root):
                names.clear()  # what lies inside an artifact is part of it
