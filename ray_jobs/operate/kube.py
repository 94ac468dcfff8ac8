"""Jobs as RayJobs on the Kubernetes cluster of a kubeconfig, each with a Ray cluster of its own."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray_jobs.operate import rayjob
from ray_jobs.operate.jobs import (
    FAILED,
    PENDING,
    RUNNING,
    ClusterError,
    Job,
    Submission,
    check_same,
    new_id,
    no_such_job,
    same_job,
)
from ray_jobs.operate.kube_errors import is_conflict, kubernetes_errors

DEFAULT_NAMESPACE = "accord"
_TIMEOUT_S = (10, 60)  # to connect, to be answered
_POLL_S = 2.0
_DASHBOARD_PORT = 8265
# What the operator says before there is a job on a Ray cluster, and when there will be none.
_WAITING = ("", "New", "Initializing", "Waiting", "Suspending", "Suspended", "Retrying")
_LOST = ("Failed", "ValidationFailed")


class Kubernetes:
    """RayJobs in one namespace."""

    def __init__(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        context: str | None = None,
        template: Path | None = None,
        image: str | None = None,
    ) -> None:
        """Reads the kubeconfig ($KUBECONFIG, ~/.kube/config, or a pod's own account).

        Raises:
            ClusterError: there is none, or it has no such context.
        """
        self.namespace = namespace
        self._template, self._image = template, image
        self._api, self.where = _client(context, namespace)

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """The job, and whether it is new. The same submission twice is one RayJob.

        Raises:
            ClusterError: the id was used for something else; no rights, no CRD, quota, ...
        """
        jobs = self.jobs()
        found = same_job(submission, jobs)
        if found is not None:
            self._ensure_recipe(submission, found.id)
            return found, False
        job_id = new_id(submission, jobs)
        template = rayjob.load_template(self._template, submission.stage)
        body = rayjob.build(submission, job_id, self.namespace, template, self._image)
        with self._errors(f"create the RayJob {job_id}"):
            try:
                made = self._custom("create_namespaced_custom_object", body=body)
            except Exception as error:
                if not is_conflict(error):
                    raise
                there = self.job(job_id)  # another was faster
                check_same(submission, there)
                return there, False
        # After the RayJob, which it belongs to; its pods wait for it.
        self._ensure_recipe(submission, job_id, made["metadata"]["uid"])
        return _job(made), True

    def jobs(self) -> list[Job]:
        """All RayJobs of Accord in the namespace, the newest first."""
        with self._errors("list RayJobs"):
            found = self._custom("list_namespaced_custom_object", label_selector=rayjob.SELECTOR)["items"]
        found.sort(key=lambda item: item["metadata"].get("creationTimestamp") or "", reverse=True)
        return [_job(item) for item in found]

    def job(self, job_id: str) -> Job:
        """Raises ClusterError when there is no RayJob of that name."""
        return _job(self._get(job_id))

    def logs(self, job_id: str) -> str:
        """All that the job has written, from its Ray cluster's Jobs API through the Kubernetes API.

        Raises:
            ClusterError: the Ray cluster is not there yet, or no more.
        """
        item = self._get(job_id)
        text = self._logs(item)
        if text is not None:
            return text
        job = _job(item)
        if job.is_finished:
            raise ClusterError(
                f"the log of {job_id} went with its cluster; it ended {job.status}. {job.message}".rstrip()
            )
        raise ClusterError(
            f"{job_id} has no log yet: its Ray cluster is being made ({job.message or job.status}). Wait "
            "with --follow, "
            f"or see what it waits for: kubectl describe rayjob {job_id} -n {self.namespace}"
        )

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Writes each change of state and the job's output, until it ends; the job then."""
        written, state = 0, ""
        while True:
            item = self._get(job_id)
            job = _job(item)
            if f"{job.status} {job.message}" != state:
                state = f"{job.status} {job.message}"
                write(f"[{job_id}: {state.strip()}]\n")
            text = self._logs(item) or ""
            if len(text) < written:  # a retry is a new cluster, with a log of its own
                written = 0
            if len(text) > written:
                write(text[written:])
                written = len(text)
            if job.is_finished:
                return job
            time.sleep(_POLL_S)

    def stop(self, job_id: str) -> str:
        """Deletes the RayJob and its cluster; the run directory stays.

        (Suspending it is not allowed beside deletion rules, and a Ray job that is stopped alone would keep
        its cluster.)
        """
        self._get(job_id)
        with self._errors(f"delete the RayJob {job_id}"):
            self._custom("delete_namespaced_custom_object", name=job_id, propagation_policy="Background")
        return (
            f"{job_id} and its cluster are being deleted; what it finished is kept. Submit it again to go on."
        )

    def services(self) -> list[dict[str, Any]]:
        """The RayServices of the namespace, as the API tells them."""
        with self._errors("list RayServices"):
            found = self._custom("list_namespaced_custom_object", plural="rayservices")
        items: list[dict[str, Any]] = found["items"]
        return items

    def _ensure_recipe(self, submission: Submission, job_id: str, uid: str | None = None) -> None:
        """The job's ConfigMap, also where a submission was cut off before it was made."""
        from kubernetes import client

        uid = uid or self._get(job_id)["metadata"]["uid"]
        body = rayjob.recipe_map(submission, job_id, self.namespace, uid)
        with self._errors(f"create the ConfigMap {body['metadata']['name']}"):
            try:
                core: Any = client.CoreV1Api(self._api)  # its types want no plain objects
                core.create_namespaced_config_map(self.namespace, body, _request_timeout=_TIMEOUT_S)
            except Exception as error:
                if not is_conflict(error):
                    raise

    def _get(self, job_id: str) -> dict[str, Any]:
        with self._errors(f"read the RayJob {job_id}"):
            try:
                found: dict[str, Any] = self._custom("get_namespaced_custom_object", name=job_id)
            except Exception as error:
                if getattr(error, "status", None) != 404:
                    raise
                jobs = self.jobs()  # without the CRD, this is the error
                raise no_such_job(job_id, self.where, jobs) from None
        return found

    def _logs(self, item: Mapping[str, Any]) -> str | None:
        """The output of the job's driver; None while, or since, there is no cluster to ask."""
        status = item.get("status") or {}
        cluster, submission = status.get("rayClusterName"), status.get("jobId")
        if not cluster or not submission:
            return None
        from kubernetes.client import ApiException

        service = f"{cluster}-head-svc:{_DASHBOARD_PORT}"
        path = f"/api/v1/namespaces/{self.namespace}/services/{service}/proxy/api/jobs/{submission}/logs"
        with self._errors("read the job's log"):
            request = self._api.param_serialize(
                "GET", path, header_params=self._token(cluster), auth_settings=["BearerToken"]
            )
            answer = self._api.call_api(*request, _request_timeout=_TIMEOUT_S)
            body = answer.read()
            if answer.status in (404, 500, 502, 503):  # no such service, or nothing behind it
                return None
            if answer.status != 200:
                raise ApiException(http_resp=answer)
        return str(json.loads(body).get("logs", ""))

    def _token(self, cluster: str) -> dict[str, str]:
        """The header that lets us into the Ray cluster; the Kubernetes API keeps `Authorization` to
        itself."""
        from kubernetes.client import ApiException, CoreV1Api

        try:
            secret = CoreV1Api(self._api).read_namespaced_secret(
                cluster, self.namespace, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:  # a cluster without authentication
                return {}
            raise
        token = base64.b64decode((secret.data or {}).get("auth_token", "")).decode()
        return {"x-ray-authorization": f"Bearer {token}"} if token else {}

    def _custom(self, method: str, plural: str = rayjob.PLURAL, **arguments: Any) -> Any:
        from kubernetes import client

        call = getattr(client.CustomObjectsApi(self._api), method)
        return call(
            group=rayjob.GROUP,
            version=rayjob.VERSION,
            namespace=self.namespace,
            plural=plural,
            _request_timeout=_TIMEOUT_S,
            **arguments,
        )

    def _errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return kubernetes_errors(doing, self.namespace, self.where)


def objects(
    submission: Submission, namespace: str, template: Path | None = None, image: str | None = None
) -> list[dict[str, Any]]:
    """The objects of a submission's first attempt; needs no cluster."""
    job_id = new_id(submission, [])
    found = rayjob.load_template(template, submission.stage)
    return [
        rayjob.build(submission, job_id, namespace, found, image),
        rayjob.recipe_map(submission, job_id, namespace),
    ]


def _client(context: str | None, namespace: str) -> tuple[Any, str]:
    """(API client, the cluster in words)"""
    from kubernetes import client
    from kubernetes import config as untyped

    config: Any = untyped
    configuration = client.Configuration()
    try:
        # Named, because the library reads $KUBECONFIG once, when it is imported.
        config.load_kube_config(os.environ.get("KUBECONFIG"), context, configuration)
    except config.ConfigException as error:
        if context is None:
            with contextlib.suppress(config.ConfigException):
                config.load_incluster_config(client_configuration=configuration)
                return client.ApiClient(configuration), f"{configuration.host}, namespace {namespace}"
        raise ClusterError(
            f"no Kubernetes cluster to submit to: {error}. See that $KUBECONFIG or ~/.kube/config has the "
            "cluster "
            "(kubectl config get-contexts), or name another --context"
        ) from None
    configuration.retries = False
    return client.ApiClient(configuration), f"{configuration.host}, namespace {namespace}"


def _job(item: Mapping[str, Any]) -> Job:
    metadata, status = item["metadata"], item.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    deployment = status.get("jobDeploymentStatus") or ""
    if deployment in _LOST:
        state = FAILED
    elif deployment in _WAITING:
        state = PENDING
    else:
        state = status.get("jobStatus") or RUNNING
    words = [status.get("reason"), status.get("message"), deployment if state == PENDING else None]
    return Job(
        id=metadata["name"],
        stage=labels[rayjob.STAGE_LABEL].replace("-", "_") if rayjob.STAGE_LABEL in labels else "-",
        recipe=annotations.get(rayjob.RECIPE_ANNOTATION, ""),
        status=state,
        content=annotations.get(rayjob.CONTENT_ANNOTATION),
        message=": ".join(word for word in words if word),
        started=_time(status.get("startTime") or metadata.get("creationTimestamp")),
        ended=_time(status.get("endTime")),
    )


def _time(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
