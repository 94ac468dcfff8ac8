"""What a run directory holds that can be registered: its models, with what was measured of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord.artifacts import MANIFEST_NAME, Manifest, read_manifest, verify
from accord.errors import ArtifactError
from accord.registry.gate import DIFFUSION, REWARD, measurements
from accord.registry.lineage import Lineage

# What is registered of a run: its directory there, the artifact's kind, the name of its digest in
# summary.json.
_MODELS = {DIFFUSION: ("aligned", "diffusion_model"), REWARD: ("reward", "reward_model")}


@dataclass(frozen=True)
class RunModel:
    """A model of a run. `ancestors` names the digests of what it was made from, the snapshot among them."""

    kind: str
    directory: Path
    manifest: Manifest
    measured: dict[str, float]
    ancestors: dict[str, str] = field(default_factory=dict)


def find_models(run_dir: str | Path) -> list[RunModel]:
    """The models of a run, checked against their manifests.

    Raises:
        ArtifactError: there is no model, or one is damaged, or summary.json speaks of another model.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    if not run_dir.is_dir():
        raise ArtifactError(f"there is no run directory {run_dir}; name it with --run-dir")
    summary = _summary(run_dir)
    lineage = Lineage.scan([run_dir])
    models = []
    for kind, (name, artifact_kind) in _MODELS.items():
        directory = run_dir / name
        if not (directory / MANIFEST_NAME).is_file():
            continue
        manifest = verify(directory, artifact_kind)
        measured = measurements(kind, summary) if _is_of(summary, name, manifest, run_dir) else {}
        models.append(RunModel(kind, directory, manifest, measured, _ancestors(lineage, manifest)))
    if not models:
        raise ArtifactError(
            f"{run_dir} holds no model to register (no {' or '.join(name for name, _ in _MODELS.values())} "
            "with a "
            f"{MANIFEST_NAME}); run `accord loop` with the same recipe first"
        )
    return models


def _summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; empty when there is none yet: such a model can be registered, but not promoted."""
    path = run_dir / "summary.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); make it again with `accord report`") from None
    return found if isinstance(found, dict) else {}


def _is_of(summary: Mapping[str, Any], name: str, manifest: Manifest, run_dir: Path) -> bool:
    digest = (summary.get("digests") or {}).get(name)
    if digest is not None and digest != manifest.digest:
        raise ArtifactError(
            f"{run_dir / 'summary.json'} was measured on another model than {run_dir / name} (digest "
            f"{str(digest)[:12]} there, {manifest.digest[:12]} here); run `accord evaluate` and `accord "
            "report` again"
        )
    return digest is not None


def _ancestors(lineage: Lineage, manifest: Manifest) -> dict[str, str]:
    """The digest of every artifact behind a model, by the name under which it went in; the nearest first."""
    found: dict[str, str] = {}
    for step in lineage.back(manifest.digest):
        if step.depth:
            found.setdefault(step.name, step.digest)
    return found


def manifest_at(directory: str | Path) -> Manifest | None:
    """The manifest of a registered model's directory, or None where that is not to be seen from here."""
    return read_manifest(directory) if Path(directory).is_dir() else None
