"""Manifests as kustomize builds them, and the pods that they will make."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.lanes import missing

K8S = Path(__file__).parents[2] / "k8s"
Manifest = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(text: str) -> list[Manifest]:
    """The manifests of a YAML stream."""
    return [document for document in yaml.load_all(text, Loader=_LOADER) if document]


def build(name: str, root: Path = K8S) -> list[Manifest]:
    """What `kubectl kustomize ROOT/NAME` makes: fresh objects, which a test may change."""
    return load(_built(name, root))


@functools.cache
def _built(name: str, root: Path) -> str:
    if shutil.which("kubectl") is None:
        missing("there is no kubectl (1.31 or newer; it needs no cluster)")
    done = subprocess.run(
        ["kubectl", "kustomize", str(root / name)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"kustomize refuses {name}: {done.stderr.strip()}")
    return done.stdout


def where(manifest: Manifest) -> str:
    """What to call a manifest in a message."""
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{manifest.get('kind')}/{name}"


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    return next(m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)


@dataclass(frozen=True)
class Pod:
    """A pod template somewhere in a manifest."""

    owner: str
    kind: str
    labels: dict[str, str]
    spec: dict[str, Any]
    most: int
    """Replicas that there can be."""

    @property
    def is_rays(self) -> bool:
        """Whether KubeRay completes it: its probes, and containers of its own."""
        return self.kind in ("RayService", "RayJob")

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(manifests: Sequence[Manifest]) -> Iterator[Pod]:
    """Every pod template, those of Ray's groups too."""
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "Job"):
            yield _pod(where(manifest), kind, spec["template"], spec.get("replicas", 1))
        elif kind in ("RayService", "RayJob"):
            cluster = spec["rayClusterConfig" if kind == "RayService" else "rayClusterSpec"]
            yield _pod(f"{where(manifest)} head", kind, cluster["headGroupSpec"]["template"], 1)
            for group in cluster["workerGroupSpecs"]:
                owner = f"{where(manifest)} {group['groupName']}"
                yield _pod(owner, kind, group["template"], group["maxReplicas"])


def _pod(owner: str, kind: str, template: Manifest, most: int) -> Pod:
    return Pod(owner, kind, template.get("metadata", {}).get("labels", {}), template["spec"], most)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        has = labels.get(rule["key"])
        if rule["operator"] != "In":
            raise AssertionError(f"the tests know matchExpressions with In alone, not {rule['operator']}")
        if has not in rule["values"]:
            return False
    return True
