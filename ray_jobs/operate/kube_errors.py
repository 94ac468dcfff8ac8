"""What the Kubernetes API answers, as errors that say what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from accord.errors import AccordError
from ray_jobs.operate.jobs import ClusterError


@contextlib.contextmanager
def kubernetes_errors(doing: str, namespace: str, where: str) -> Iterator[None]:
    """Raises ClusterError for everything that the Kubernetes client raises; `where` names the cluster."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except AccordError:
        raise
    except ApiException as error:
        advice = _advice(int(error.status or 0), *_message(error), namespace)
        raise ClusterError(f"cannot {doing} in {where}: {advice}") from None
    except (HTTPError, OSError) as error:
        raise ClusterError(
            f"cannot {doing}: the Kubernetes API of {where} does not answer ({type(error).__name__}). See "
            "that the "
            "cluster is up (kubectl cluster-info), or name another with --context"
        ) from None


def is_conflict(error: Exception) -> bool:
    """Whether an object of that name was there already."""
    return getattr(error, "status", None) == 409


def _message(error: Exception) -> tuple[str, str]:
    """(the API's message, the kind of object that it speaks of), from a Status object."""
    body = getattr(error, "body", None) or ""
    try:
        status = json.loads(body)
        return str(status.get("message", "")), str((status.get("details") or {}).get("kind", ""))
    except (ValueError, AttributeError):  # not even the API's form: the path is unknown
        return "", ""


def _advice(status: int, message: str, kind: str, namespace: str) -> str:
    if status == 401:
        return (
            f"it does not know who we are ({message or '401'}). Renew the credentials in your kubeconfig "
            "(kubectl auth whoami)"
        )
    if status == 403 and "exceeded quota" in message:
        return (
            f"the quota of the namespace is used up: {message}. Wait for other jobs or stop one (accord job "
            "list), or ask "
            f"for more (kubectl describe quota -n {namespace})"
        )
    if status == 403:
        return (
            f"no rights: {message}. Ask for a role in {namespace} that may get, list, create and delete "
            "rayjobs (ray.io) "
            f"and create configmaps (kubectl auth can-i create rayjobs.ray.io -n {namespace})"
        )
    if status == 404 and kind == "namespaces":
        return f"there is no namespace {namespace!r}: {message}. Name another with --namespace, or create it"
    if status == 404 and not kind:
        return (
            "it knows no RayJobs (no CRD rayjobs.ray.io), so KubeRay is not installed. Install the operator "
            "with its CRDs "
            "(helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0)"
        )
    if status == 404:
        return f"it is not there: {message}"
    if status == 409:
        return f"it was changed meanwhile: {message}. Give the same command again"
    if status in (400, 422):
        return f"it refuses the object: {message}. See what would be sent with --dry-run"
    return f"it answered {status}: {message or 'no reason given'}. Give the same command again later"
