"""What runs and what waits, from everything that answers; what does not answer is named, and stops
nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.config import environment_value
from accord.errors import AccordError
from accord.local_servers import LocalServer, local_servers
from ray_jobs.operate.commands import table
from ray_jobs.operate.jobs import Job

_SHOWN_JOBS = 5
_ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sources:
    """Where to look. What is None is not looked at, and named as such."""

    address: str | None = None
    kubernetes: bool = False
    namespace: str = "accord"
    context: str | None = None
    registry: str | None = None
    feedback: str | None = None
    judgements_per_image: int = 1


def look(sources: Sources) -> dict[str, Any]:
    """{"services", "jobs", "models", "feedback"}: each what was found, or {"missing": why}."""
    parts: dict[str, Callable[[Sources], Any]] = {
        "services": _services,
        "jobs": _jobs,
        "models": _models,
        "feedback": _feedback,
    }
    return {name: _ask(ask, sources) for name, ask in parts.items()}


def render(parts: Mapping[str, Any]) -> list[str]:
    """The status as lines of text."""
    lines: list[str] = []
    for name, show in (
        ("services", _service_lines),
        ("jobs", _job_lines),
        ("models", _model_lines),
        ("feedback", _feedback_lines),
    ):
        found = parts[name]
        lines.append(f"{name.capitalize()}:")
        shown = [f"not known: {found['missing']}"] if "missing" in found else show(found)
        lines += [f"  {line}" for text in shown for line in text.splitlines()]
    return lines


def _ask(ask: Callable[[Sources], Any], sources: Sources) -> Any:
    try:
        return ask(sources)
    except AccordError as error:
        return {"missing": str(error)}


def _services(sources: Sources) -> dict[str, Any]:
    if sources.kubernetes:
        return {"applications": [_ray_service(item) for item in _kubernetes(sources).services()]}
    if sources.address is None:
        found = [_local(server) for server in local_servers()]
        if not found:
            return {
                "missing": "no `accord serve` runs on this machine; for what serves elsewhere give --address "
                "of a Ray cluster, or --kubernetes"
            }
        return {"applications": found}
    from ray_jobs.operate.ray_api import RayApi

    details = RayApi(sources.address).serve_details()
    return {"applications": [_application(name, found) for name, found in sorted(details.items())]}


def _local(server: LocalServer) -> dict[str, Any]:
    """An `accord serve` of this machine, with the models that it says it has loaded."""
    from accord.client import Client, RetryPolicy
    from accord.client.errors import DeadlineExceeded, Unavailable

    about = {
        "name": f"accord serve at {server.address}",
        "process_id": server.process_id,
        "metrics": server.metrics_address,
        "token_file": server.secret_path,
    }
    if not Path(server.secret_path).is_file():  # another server's token is not for this one
        message = f"its models are not known: its token is no longer in {server.secret_path}"
        return {**about, "status": "RUNNING", "message": message, "deployments": []}
    address = f"grpc://{server.address}"  # without TLS, whatever the environment says of other servers
    try:
        with Client(address, token_file=server.secret_path, retry=RetryPolicy(max_attempts=1)) as client:
            models = client.models(timeout_s=_ASK_TIMEOUT_S)
    except AccordError as error:
        silent = isinstance(error, (Unavailable, DeadlineExceeded))
        status = "NOT ANSWERING" if silent else "RUNNING"
        return {**about, "status": status, "message": f"its models are not known: {error}", "deployments": []}
    loaded = [
        {
            "name": f"{model.kind} {model.alias}",
            "status": f"loaded{', default' if model.is_default else ''}",
            "running": None,
            "wanted": None,
            "message": f"({model.digest[:12]})",
        }
        for model in models
    ]
    message = f"(process {server.process_id}, metrics at {server.metrics_address})"
    return {**about, "status": "RUNNING", "message": message, "deployments": loaded}


def _application(name: str, details: Mapping[str, Any]) -> dict[str, Any]:
    deployments = []
    for deployment, found in sorted((details.get("deployments") or {}).items()):
        states = [replica.get("state") for replica in found.get("replicas") or []]
        deployments.append(
            {
                "name": deployment,
                "status": found.get("status"),
                "running": states.count("RUNNING"),
                "wanted": found.get("target_num_replicas", len(states)),
                "message": found.get("message") or "",
            }
        )
    return {
        "name": name,
        "status": details.get("status"),
        "message": details.get("message") or "",
        "deployments": deployments,
    }


def _ray_service(item: Mapping[str, Any]) -> dict[str, Any]:
    """A RayService: the deployments of the cluster that serves, as the operator tells them."""
    status = item.get("status") or {}
    active = status.get("activeServiceStatus") or {}
    deployments = [
        {
            "name": f"{application}/{name}",
            "status": found.get("status"),
            "message": found.get("message") or "",
            "running": None,
            "wanted": None,
        }
        for application, details in sorted((active.get("applicationStatuses") or {}).items())
        for name, found in sorted((details.get("serveDeploymentStatuses") or {}).items())
    ]
    conditions = {one.get("type"): one for one in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    return {
        "name": item["metadata"]["name"],
        "status": "READY" if ready.get("status") == "True" else "NOT READY",
        "message": "" if ready.get("status") == "True" else str(ready.get("message", "")),
        "deployments": deployments,
    }


def _jobs(sources: Sources) -> dict[str, Any]:
    if sources.kubernetes:
        return {"jobs": [vars(job) for job in _kubernetes(sources).jobs()]}
    if sources.address is None:
        return {"missing": "no --address of a Ray cluster, and no --kubernetes"}
    from ray_jobs.operate.ray_api import RayApi

    return {"jobs": [vars(job) for job in RayApi(sources.address).jobs()]}


def _kubernetes(sources: Sources) -> Any:
    from ray_jobs.operate.kube import Kubernetes

    return Kubernetes(sources.namespace, sources.context)


def _models(sources: Sources) -> dict[str, Any]:
    from accord.registry.registry import Registry
    from accord.registry.settings import registry_uri

    uri = registry_uri(sources.registry)
    if _is_absent_file(uri):
        return {"missing": "there is no registry yet; `accord models register RECIPE` makes one"}
    serving = [version for version in Registry(uri).versions() if version.aliases]
    return {
        "serving": [
            {
                "model": str(version),
                "as": list(version.aliases),
                "digest": version.digest,
                "recipe": version.recipe,
            }
            for version in serving
        ]
    }


def _feedback(sources: Sources) -> dict[str, Any]:
    if sources.feedback is None:
        return {"missing": "no store of judgements was named; give --feedback or set ACCORD_DATABASE_URL"}
    from accord.feedback.store import FeedbackStore

    url = environment_value(sources.feedback, "the store of judgements")
    if _is_absent_file(url):
        return {"missing": "there is no such SQLite file; `accord judge` or the rating page makes it"}
    with FeedbackStore(url) as store:
        counts = store.vote_counts()
        return {
            "candidates": len(store.candidates()),
            "judgements": sum(row.count for row in counts),
            "waiting": len(store.pending(sources.judgements_per_image)),
            "judgements_per_image": sources.judgements_per_image,
        }


def _is_absent_file(url: str) -> bool:
    """Whether it is a SQLite file that is not there: opening it would make it."""
    return url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists()


def _service_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for application in found["applications"]:
        lines.append(f"{application['name']}: {application['status']} {application['message']}".rstrip())
        for deployment in application["deployments"]:
            replicas = ""
            if deployment["wanted"] is not None:
                replicas = f", {deployment['running']} of {deployment['wanted']} replicas run"
            state = f"{deployment['status']}{replicas} {deployment['message']}"
            lines.append(f"  {deployment['name']}: {state}".rstrip())
    return lines or ["none"]


def _job_lines(found: Mapping[str, Any]) -> list[str]:
    jobs = [Job(**job) for job in found["jobs"]]
    unfinished = [job for job in jobs if not job.is_finished]
    shown = (unfinished + [job for job in jobs if job.is_finished])[: max(_SHOWN_JOBS, len(unfinished))]
    rest = len(jobs) - len(shown)
    return [*(table(shown) if shown else ["none"]), *([f"and {rest} that ended before"] if rest else [])]


def _model_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{model['model']} is {', '.join(model['as'])} ({model['digest'][:12]}, of {model['recipe']})"
        for model in found["serving"]
    ] or ["none: no model of the registry has the alias champion or canary"]


def _feedback_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{found['waiting']} of {found['candidates']} images wait for their {found['judgements_per_image']} "
        f"judgement(s); {found['judgements']} were given"
    ]
