"""Every overlay, component and job builds, has only fields that are known, and keeps our rules."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import K8S, build, named, of_kind, pods, where
from tests.k8s.policy import violations
from tests.k8s.schemas import problems

COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
BUILDS = [
    "base",
    "cluster",
    "jobs",
    *sorted(f"overlays/{p.parent.name}" for p in K8S.glob("overlays/*/kustomization.yaml")),
]
# What is applied together, and so is judged together.
TOGETHER = [
    ("base", "jobs"),
    ("overlays/local", "jobs"),
    ("overlays/production", "overlays/production-jobs"),
    ("overlays/everything",),
]


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_has_only_fields_that_are_known(name: str) -> None:
    manifests = build(name)
    assert manifests
    assert [text for manifest in manifests for text in problems(manifest)] == []


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_a_build_keeps_our_rules(names: tuple[str, ...]) -> None:
    assert violations([manifest for name in names for manifest in build(name)]) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_is_switched_on_by_one_line(component: str, tmp_path: Path) -> None:
    """On the base and the jobs alone: whatever it needs, it brings."""
    root = tmp_path / "k8s"
    shutil.copytree(K8S, root)
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "accord",
        "resources": ["../base", "../jobs"],
        "components": [f"../components/{component}"],
    }
    (root / "one").mkdir()
    (root / "one" / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    manifests = build("one", root)
    assert [text for manifest in manifests for text in problems(manifest)] == []
    assert violations(manifests) == []
    before = [*build("base"), *build("jobs")]
    assert [manifest for manifest in manifests if manifest not in before], "the component changes nothing"


def test_everything_is_in_one_namespace() -> None:
    for manifest in build("overlays/everything"):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"].get("namespace") == "accord", where(manifest)


def test_everything_has_every_component() -> None:
    everything = yaml.safe_load((K8S / "overlays/everything/kustomization.yaml").read_text(encoding="utf-8"))
    assert sorted(Path(path).name for path in everything["components"]) == COMPONENTS


def test_production_runs_no_image_of_an_unnamed_registry() -> None:
    for name in ("overlays/production", "overlays/production-jobs"):
        for pod in pods(build(name)):
            for container in pod.containers:
                assert not container["image"].startswith("accord-"), pod.owner


def test_the_kubernetes_token_goes_to_the_autoscaler_alone() -> None:
    cluster = named(build("base"), "RayService", "accord")["spec"]["rayClusterConfig"]
    mounts = [mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]]
    assert "/var/run/secrets/kubernetes.io/serviceaccount" in mounts
    volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]} <= volumes


def test_every_secret_that_is_named_is_in_the_documents() -> None:
    page = (K8S.parent / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    wanted = set()
    for manifest in build("overlays/everything"):
        wanted |= set(_secrets(manifest))
    assert wanted
    assert sorted(name for name in wanted if f"`{name}`" not in page) == []


def _secrets(value: object, key: str = "") -> list[str]:
    if isinstance(value, list):
        return [name for part in value for name in _secrets(part, key)]
    if not isinstance(value, dict):
        return []
    found = [str(value["secretName"])] if "secretName" in value else []
    if (key in ("secretRef", "secretKeyRef") or value.get("kind") == "Secret") and "name" in value:
        found.append(str(value["name"]))
    return found + [name for inner, part in value.items() for name in _secrets(part, inner)]


@pytest.mark.parametrize(
    "kind", ["RayService", "RayJob", "Deployment", "StatefulSet", "NetworkPolicy", "GRPCRoute"]
)
def test_the_rules_had_something_to_judge(kind: str) -> None:
    assert of_kind(build("overlays/everything"), kind)
