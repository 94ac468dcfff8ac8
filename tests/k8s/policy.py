"""What we ask of manifests beyond their schemas. A rule takes all of a build and says what breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from tests.k8s.manifests import K8S, Manifest, of_kind, pods, selects, where

Rule = Callable[[Sequence[Manifest]], Iterator[str]]
RULES: dict[str, Rule] = {}
OPERATOR_VOLUMES = {
    "configMap",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|_KEY)$")
RECIPES = K8S.parent / "recipes"
_URL_WITH_PASSWORD = re.compile(r"\w+://[^/\s:@]+:[^/\s@$]+@")


def rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


@rule
def pods_are_restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Pod Security `restricted`, written out, so that nothing depends on an image's defaults."""
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        if not (context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0):
            yield f"{pod.owner}: runAsNonRoot and a runAsUser above 0 are missing"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner}: seccompProfile is not RuntimeDefault"
        for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            if pod.spec.get(key):
                yield f"{pod.owner}: {key}"
        for volume in pod.spec.get("volumes", []):
            if not set(volume) - {"name"} <= OPERATOR_VOLUMES:
                yield f"{pod.owner}: the volume {volume['name']} is of a kind that `restricted` forbids"
        for container in pod.containers:
            yield from _unrestricted(f"{pod.owner} {container['name']}", container.get("securityContext", {}))


def _unrestricted(owner: str, context: dict[str, Any]) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{owner}: allowPrivilegeEscalation is not false"
    if context.get("capabilities", {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
        yield f"{owner}: capabilities are not dropped, all of them"
    if context.get("privileged") or context.get("runAsUser") == 0:
        yield f"{owner}: privileged, or root"


@rule
def root_is_read_only(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.containers:
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{pod.owner} {container['name']}: the root file system can be written to"


@rule
def images_are_pinned(manifests: Sequence[Manifest]) -> Iterator[str]:
    """By a tag that names a version, or by digest."""
    for pod in pods(manifests):
        for container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and not (re.search(r"\d", tag) and tag != "latest"):
                yield f"{pod.owner} {container['name']}: {image} names no version"


@rule
def resources_are_bounded(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Requests and limits of CPU, memory and disk; no memory beyond what was asked for, on Ray's pods."""
    for pod in pods(manifests):
        for container in pod.containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            lacking = [
                f"{kind} limit" for kind in ("cpu", "memory", "ephemeral-storage") if kind not in limits
            ]
            lacking += [f"{kind} request" for kind in ("cpu", "memory") if kind not in requests]
            if lacking:
                yield f"{pod.owner} {container['name']}: no {', no '.join(lacking)}"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.owner}: the volume {volume['name']} has no sizeLimit"


@rule
def containers_are_probed(manifests: Sequence[Manifest]) -> Iterator[str]:
    """But for jobs, which end, and Ray's containers, whose probes the operator adds (rayVersion >= 2.53)."""
    for pod in pods(manifests):
        if pod.kind in ("Deployment", "StatefulSet"):
            for container in pod.spec["containers"]:
                lacking = [
                    name
                    for name in ("livenessProbe", "readinessProbe", "startupProbe")
                    if name not in container
                ]
                if lacking:
                    yield f"{pod.owner} {container['name']}: no {', no '.join(lacking)}"
    for manifest in manifests:
        if cluster := _cluster(manifest):
            version = tuple(int(part) for part in str(cluster.get("rayVersion", "0.0")).split(".")[:2])
            if version < (2, 53):
                yield f"{where(manifest)}: rayVersion {cluster.get('rayVersion')} gets no HTTP probes"


@rule
def no_secret_is_in_clear(manifests: Sequence[Manifest]) -> Iterator[str]:
    for secret in of_kind(manifests, "Secret"):
        yield f"{where(secret)}: secrets are not kept with manifests"
    for pod in pods(manifests):
        for container in pod.containers:
            for variable in container.get("env", []):
                if _SECRET_NAME.search(variable["name"]) and variable.get("value"):
                    yield f"{pod.owner} {container['name']}: {variable['name']} has its value in clear"
    for manifest in manifests:
        for text in _strings(manifest):
            if _URL_WITH_PASSWORD.search(text):
                yield f"{where(manifest)}: a URL with a password in it"


@rule
def tokens_are_not_mounted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Nobody gets a Kubernetes token by default, nor the namespace's default account. Who mounts one has an
    account whose roles name each object that it may touch."""
    for account in of_kind(manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{where(account)}: automountServiceAccountToken is not false"
    for pod in pods(manifests):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: automountServiceAccountToken is not false"
        if pod.spec.get("serviceAccountName", "default") == "default":
            yield f"{pod.owner}: no account of its own"
        for container in pod.containers:
            mounts = any(
                "serviceaccount" in mount["mountPath"] for mount in container.get("volumeMounts", [])
            )
            if mounts and not _is_narrow(manifests, pod.spec.get("serviceAccountName", "default")):
                yield f"{pod.owner} {container['name']}: mounts a Kubernetes token"
    for kind in ("Role", "ClusterRole"):
        for role in of_kind(manifests, kind):
            if any(
                "*" in rule.get(key, [])
                for rule in role["rules"]
                for key in ("verbs", "resources", "apiGroups")
            ):
                yield f"{where(role)}: grants everything of something"


def _is_narrow(manifests: Sequence[Manifest], account: str) -> bool:
    """Whether an account has roles of this build, and each rule of theirs names its objects."""
    names = {
        binding["roleRef"]["name"]
        for binding in of_kind(manifests, "RoleBinding")
        if any(one["kind"] == "ServiceAccount" and one["name"] == account for one in binding["subjects"])
    }
    rules = [
        rule
        for role in of_kind(manifests, "Role")
        if role["metadata"]["name"] in names
        for rule in role["rules"]
    ]
    return bool(rules) and all(rule.get("resourceNames") for rule in rules)


@rule
def networks_are_closed(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Everything is denied, and each pod has policies of its own for both directions."""
    policies = of_kind(manifests, "NetworkPolicy")
    denying = [
        p
        for p in policies
        if not p["spec"].get("podSelector")
        and not p["spec"].get("ingress")
        and not p["spec"].get("egress")
        and set(p["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
    ]
    if not denying:
        yield "no NetworkPolicy denies everything by default"
    for policy in policies:
        for direction in ("ingress", "egress"):
            for opening in policy["spec"].get(direction, []):
                if not opening.get("from" if direction == "ingress" else "to"):
                    yield f"{where(policy)}: its {direction} is open to all"
    for pod in pods(manifests):
        mine = [
            p
            for p in policies
            if p["spec"].get("podSelector") and selects(p["spec"]["podSelector"], pod.labels)
        ]
        for direction in ("Ingress", "Egress"):
            if not any(direction in policy["spec"]["policyTypes"] for policy in mine):
                yield f"{pod.owner}: no NetworkPolicy says its {direction.lower()}"


@rule
def disruptions_are_budgeted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Each pod of a service has a budget; each budget covers some pod."""
    all_pods = list(pods(manifests))
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for pod in all_pods:
        if pod.kind in ("Job", "RayJob"):
            continue
        if sum(selects(budget["spec"]["selector"], pod.labels) for budget in budgets) != 1:
            yield f"{pod.owner}: not exactly one PodDisruptionBudget covers it"
    for budget in budgets:
        if not any(selects(budget["spec"]["selector"], pod.labels) for pod in all_pods):
            yield f"{where(budget)}: covers no pod"


@rule
def replicas_are_spread(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        constraints = pod.spec.get("topologySpreadConstraints", [])
        if pod.most > 1 and not any(selects(c["labelSelector"], pod.labels) for c in constraints):
            yield f"{pod.owner}: up to {pod.most} replicas, and nothing spreads them over nodes"


@rule
def services_lead_somewhere(manifests: Sequence[Manifest]) -> Iterator[str]:
    for service in of_kind(manifests, "Service"):
        found = [
            pod
            for pod in pods(manifests)
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]
        if not found:
            yield f"{where(service)}: selects no pod"
        for port in service["spec"]["ports"]:
            for pod in found:
                declared = [p for container in pod.spec["containers"] for p in container.get("ports", [])]
                if port["targetPort"] not in {p[key] for p in declared for key in ("name", "containerPort")}:
                    yield f"{where(service)}: {pod.owner} has no port {port['targetPort']}"


@rule
def references_are_there(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Accounts, volume claims and ConfigMaps that pods name are in the build."""
    known = {(m["kind"], m["metadata"]["name"]) for m in manifests} | {("ConfigMap", "kube-root-ca.crt")}
    for pod in pods(manifests):
        wanted = [("ServiceAccount", pod.spec.get("serviceAccountName", ""))]
        names = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "configMap" in volume:
                wanted.append(("ConfigMap", volume["configMap"]["name"]))
        for container in pod.containers:
            wanted += [
                ("ConfigMap", source["configMapRef"]["name"])
                for source in container.get("envFrom", [])
                if "configMapRef" in source
            ]
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names and pod.kind != "StatefulSet":
                    yield f"{pod.owner} {container['name']}: {mount['name']} is no volume of the pod"
        yield from (
            f"{pod.owner}: {kind} {name} is not in the build"
            for kind, name in wanted
            if (kind, name) not in known
        )


@rule
def the_namespace_is_restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    for namespace in of_kind(manifests, "Namespace"):
        for mode in ("enforce", "audit", "warn"):
            if (
                namespace["metadata"].get("labels", {}).get(f"pod-security.kubernetes.io/{mode}")
                != "restricted"
            ):
                yield f"{where(namespace)}: {mode} is not restricted"
    if not of_kind(manifests, "Namespace"):
        yield "no Namespace"


@rule
def added_containers_are_restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What KubeRay adds: the autoscaler takes autoscalerOptions.securityContext, a worker's init container
    that of the worker, and a job's submitter none at all, so there must be no submitter (HTTPMode)."""
    for manifest in manifests:
        cluster = _cluster(manifest)
        if cluster is None:
            continue
        if cluster.get("enableInTreeAutoscaling"):
            options = cluster.get("autoscalerOptions", {})
            owner = f"{where(manifest)} autoscaler"
            yield from _unrestricted(owner, options.get("securityContext", {}))
            if options.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{owner}: the root file system can be written to"
            if not {"requests", "limits"} <= set(options.get("resources", {})):
                yield f"{owner}: no requests and limits"
        if manifest["kind"] == "RayJob" and manifest["spec"].get("submissionMode") != "HTTPMode":
            mode = manifest["spec"].get("submissionMode")
            yield f"{where(manifest)}: {mode} adds a submitter that is not restricted"


@rule
def ray_asks_for_its_token(manifests: Sequence[Manifest]) -> Iterator[str]:
    """And its head runs no work of others, and is reached inside the cluster alone."""
    for manifest in manifests:
        if cluster := _cluster(manifest):
            if cluster.get("authOptions", {}).get("mode") != "token":
                yield f"{where(manifest)}: authOptions.mode is not token"
            head = cluster["headGroupSpec"]
            if head["rayStartParams"].get("num-cpus") != "0":
                yield f"{where(manifest)}: the head has CPUs for work"
            if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
                yield f"{where(manifest)}: the head can be reached from outside"


@rule
def one_version_writes_the_store(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A new version migrates the tables when it starts; an older one beside it would count wrongly."""
    for manifest in of_kind(manifests, "Deployment"):
        strategy = manifest["spec"].get("strategy")
        if manifest["metadata"]["name"] == "feedback" and strategy != {"type": "Recreate"}:
            yield f"{where(manifest)}: two versions run at once, one on tables that it does not know"


@rule
def jobs_and_people_share_a_store(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Where people judge (the recipe has no panel), jobs read the store that the rating page writes."""
    settings = {m["metadata"]["name"]: m.get("data", {}) for m in of_kind(manifests, "ConfigMap")}
    for pod in pods(manifests):
        if pod.labels.get("app.kubernetes.io/component") != "feedback" or "accord-job" not in settings:
            continue
        job = settings["accord-job"]
        urls = [one.partition("=")[2] for one in pod.containers[0]["args"] if one.startswith("url=")]
        options = f"{job.get('ACCORD_SETTINGS', '')} {job.get('ACCORD_STORE', '')}"
        found = re.findall(r"feedback\.url=(?:env:)?(\S+)", options)
        theirs = job.get(found[-1], found[-1]) if found else "SQLite in the run directory"
        ours = urls[-1] if urls else "SQLite on its own volume"
        same = theirs.replace("+psycopg", "") == ours
        recipe = RECIPES / job["ACCORD_RECIPE"].partition("/recipes/")[2]
        if not same and (
            urls or found or yaml.safe_load(recipe.read_text(encoding="utf-8")).get("panel") is None
        ):
            yield f"{pod.owner}: people judge into {ours}, and jobs read {theirs}"


def _cluster(manifest: Manifest) -> dict[str, Any] | None:
    key = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}.get(manifest["kind"])
    found: dict[str, Any] | None = manifest["spec"][key] if key else None
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value


def violations(manifests: Sequence[Manifest]) -> list[str]:
    """All that breaks a rule, each with the rule's name before it."""
    return [f"{name}: {text}" for name, check in RULES.items() for text in check(manifests)]
