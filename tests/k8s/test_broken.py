"""Manifests broken on purpose are caught: one of each kind by the schemas, one or more by each rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.manifests import Manifest, build, named, of_kind
from tests.k8s.policy import RULES, violations
from tests.k8s.schemas import problems

KINDS = sorted({manifest["kind"] for name in ("overlays/everything", "cluster") for manifest in build(name)})


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_caught(kind: str) -> None:
    manifest = _one(kind)
    where = manifest.get("spec", manifest)
    where["replicsa"] = 3
    assert any("replicsa" in text for text in problems(manifest))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_type_is_caught(kind: str) -> None:
    manifest = _one(kind)
    manifest["spec" if "spec" in manifest else "metadata"] = "text"
    if kind in ("ConfigMap", "ServiceAccount"):
        assert problems(manifest)
    else:
        assert any("object" in text for text in problems(manifest))


def _one(kind: str) -> Manifest:
    return next(m for name in ("overlays/everything", "cluster") for m in build(name) if m["kind"] == kind)


def test_an_unknown_field_deep_in_a_ray_pod_is_caught() -> None:
    service = named(build("base"), "RayService", "accord")
    _ray(service)["containers"][0]["securityContext"]["runAsNotRoot"] = True
    assert any("runAsNotRoot" in text for text in problems(service))


def test_a_kind_that_nobody_knows_is_caught() -> None:
    assert problems({"apiVersion": "ray.io/v1", "kind": "RayServce", "metadata": {"name": "x"}, "spec": {}})
    assert problems({"apiVersion": "apps/v1", "kind": "Deploymint", "metadata": {"name": "x"}, "spec": {}})
    assert problems({"metadata": {"name": "x"}})


def _ray(service: Manifest, group: int = 1) -> dict[str, Any]:
    spec: dict[str, Any] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][group]["template"]["spec"]
    return spec


def _feedback(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = named(manifests, "Deployment", "feedback")["spec"]["template"]["spec"]
    return spec


def _job_settings(manifests: list[Manifest]) -> dict[str, str]:
    data: dict[str, str] = named(manifests, "ConfigMap", "accord-job")["data"]
    return data


def _service(manifests: list[Manifest]) -> Manifest:
    return named(manifests, "RayService", "accord")


def _drop(manifests: list[Manifest], kind: str, name: str) -> None:
    manifests.remove(named(manifests, kind, name))


def _serving_pod(manifests: list[Manifest]) -> dict[str, Any]:
    return _ray(_service(manifests))


BREAKS: list[tuple[str, str, Callable[[list[Manifest]], object]]] = [
    ("pods_are_restricted", "root", lambda m: _feedback(m)["securityContext"].update(runAsUser=0)),
    (
        "pods_are_restricted",
        "escalation",
        lambda m: _serving_pod(m)["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    (
        "pods_are_restricted",
        "capability",
        lambda m: _serving_pod(m)["containers"][0]["securityContext"]["capabilities"].update(
            add=["SYS_PTRACE"]
        ),
    ),
    ("pods_are_restricted", "no seccomp", lambda m: _serving_pod(m)["securityContext"].pop("seccompProfile")),
    (
        "pods_are_restricted",
        "host path",
        lambda m: _feedback(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    ),
    ("pods_are_restricted", "host network", lambda m: _serving_pod(m).update(hostNetwork=True)),
    (
        "root_is_read_only",
        "writable",
        lambda m: _serving_pod(m)["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        "images_are_pinned",
        "latest",
        lambda m: _serving_pod(m)["containers"][0].update(image="registry:5000/accord:latest"),
    ),
    (
        "images_are_pinned",
        "no tag",
        lambda m: _feedback(m)["containers"][0].update(image="registry:5000/accord"),
    ),
    (
        "resources_are_bounded",
        "no memory limit",
        lambda m: _feedback(m)["containers"][0]["resources"]["limits"].pop("memory"),
    ),
    (
        "resources_are_bounded",
        "unbounded disk",
        lambda m: _feedback(m)["volumes"].append({"name": "x", "emptyDir": {}}),
    ),
    ("containers_are_probed", "no readiness", lambda m: _feedback(m)["containers"][0].pop("readinessProbe")),
    (
        "containers_are_probed",
        "old Ray",
        lambda m: _service(m)["spec"]["rayClusterConfig"].update(rayVersion="2.52.0"),
    ),
    (
        "no_secret_is_in_clear",
        "a Secret",
        lambda m: m.append({"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}}),
    ),
    (
        "no_secret_is_in_clear",
        "in the environment",
        lambda m: _feedback(m)["containers"][0].update(env=[{"name": "DB_PASSWORD", "value": "x"}]),
    ),
    (
        "no_secret_is_in_clear",
        "in a URL",
        lambda m: _feedback(m)["containers"][0].update(args=["postgresql://a:hunter2@db/x"]),
    ),
    ("tokens_are_not_mounted", "by default", lambda m: _serving_pod(m).pop("automountServiceAccountToken")),
    ("tokens_are_not_mounted", "default account", lambda m: _feedback(m).pop("serviceAccountName")),
    (
        "tokens_are_not_mounted",
        "every verb",
        lambda m: m.append(
            {
                "kind": "Role",
                "metadata": {"name": "r"},
                "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}],
            }
        ),
    ),
    (
        "tokens_are_not_mounted",
        "no narrow role",
        lambda m: _feedback(m)["containers"][0]["volumeMounts"].append(
            {"name": "tmp", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
        ),
    ),
    (
        "one_version_writes_the_store",
        "a rolling update",
        lambda m: named(m, "Deployment", "feedback")["spec"].update(strategy={"type": "RollingUpdate"}),
    ),
    (
        "jobs_and_people_share_a_store",
        "people judge into SQLite",
        lambda m: _job_settings(m).update(ACCORD_RECIPE="/app/recipes/sd15/paper.yaml"),
    ),
    (
        "jobs_and_people_share_a_store",
        "jobs read another",
        lambda m: _job_settings(m).update(ACCORD_STORE="--set feedback.url=postgresql://db/other"),
    ),
    ("networks_are_closed", "no denial", lambda m: _drop(m, "NetworkPolicy", "default-deny")),
    ("networks_are_closed", "a pod without a policy", lambda m: _drop(m, "NetworkPolicy", "mlflow")),
    (
        "networks_are_closed",
        "open to all",
        lambda m: named(m, "NetworkPolicy", "mlflow")["spec"]["ingress"].append({"ports": [{"port": 5000}]}),
    ),
    ("disruptions_are_budgeted", "no budget", lambda m: _drop(m, "PodDisruptionBudget", "models")),
    (
        "disruptions_are_budgeted",
        "covers nothing",
        lambda m: named(m, "PodDisruptionBudget", "gateway")["spec"]["selector"]["matchLabels"].update(
            {"accord.dev/group": "gatway"}
        ),
    ),
    ("replicas_are_spread", "not spread", lambda m: _serving_pod(m).pop("topologySpreadConstraints")),
    (
        "services_lead_somewhere",
        "no pod",
        lambda m: named(m, "Service", "mlflow")["spec"]["selector"].update(
            {"app.kubernetes.io/name": "acord"}
        ),
    ),
    (
        "services_lead_somewhere",
        "no port",
        lambda m: named(m, "Service", "feedback")["spec"]["ports"][0].update(targetPort="htp"),
    ),
    ("references_are_there", "no claim", lambda m: _drop(m, "PersistentVolumeClaim", "accord-runs")),
    ("references_are_there", "no settings", lambda m: _drop(m, "ConfigMap", "accord-job")),
    (
        "references_are_there",
        "no volume",
        lambda m: _feedback(m)["containers"][0]["volumeMounts"].append({"name": "nope", "mountPath": "/x"}),
    ),
    (
        "the_namespace_is_restricted",
        "baseline",
        lambda m: of_kind(m, "Namespace")[0]["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
    ),
    (
        "added_containers_are_restricted",
        "autoscaler",
        lambda m: _service(m)["spec"]["rayClusterConfig"]["autoscalerOptions"].pop("securityContext"),
    ),
    (
        "added_containers_are_restricted",
        "sidecar",
        lambda m: of_kind(m, "RayJob")[0]["spec"].update(submissionMode="SidecarMode"),
    ),
    (
        "ray_asks_for_its_token",
        "no token",
        lambda m: _service(m)["spec"]["rayClusterConfig"].pop("authOptions"),
    ),
    (
        "ray_asks_for_its_token",
        "busy head",
        lambda m: _service(m)["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    ),
    (
        "ray_asks_for_its_token",
        "open head",
        lambda m: _service(m)["spec"]["rayClusterConfig"]["headGroupSpec"].update(serviceType="LoadBalancer"),
    ),
]


@pytest.mark.parametrize(
    ("rule", "how", "break_it"), BREAKS, ids=[f"{rule}-{how}" for rule, how, _ in BREAKS]
)
def test_our_rules_catch_it(rule: str, how: str, break_it: Callable[[list[Manifest]], object]) -> None:
    manifests = [*build("base"), *build("jobs")]
    break_it(manifests)
    assert [text for text in violations(manifests) if text.startswith(f"{rule}:")]


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(RULES)
