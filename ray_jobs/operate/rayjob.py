"""A submission as Kubernetes objects: a RayJob from our template, and a ConfigMap that holds its recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import accord
from accord.errors import ConfigError
from ray_jobs.operate.jobs import RECIPE_NAME, Submission

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
STAGE_LABEL = "accord.dev/stage"
RECIPE_ANNOTATION = "accord.dev/recipe"
CONTENT_ANNOTATION = "accord.dev/content"
SELECTOR = "app.kubernetes.io/name=accord,app.kubernetes.io/component=job"

TEMPLATE = Path("k8s") / "jobs" / "template" / "rayjob.yaml"
_RECIPE_DIRECTORY = "/etc/accord/recipe"
_RECIPE_VOLUME = "recipe"
_RUNS = "/runs"  # where the template mounts the disk that outlives a cluster
_TEMPLATE_NAME = "stage"  # the name in our template, which belongs to no stage
_TEMPLATE_IMAGE = "accord-train"
_LOOP_DEADLINE_S = 4 * 86400  # all stages in order; of one, the template's own


def load_template(path: Path | None, stage: str) -> dict[str, Any]:
    """The RayJob to start from: that of our k8s/ or, of a file that `kubectl kustomize` wrote, the stage's.

    Raises:
        ConfigError: there is no such file, or no RayJob of the stage in it.
    """
    if path is None:
        path = Path(accord.__file__).resolve().parent.parent / TEMPLATE
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}: k8s/ is not part of the installed package. Run this from a checkout "
                "of Accord, or "
                "name a RayJob to start from with --template"
            )
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the template {path}: {type(error).__name__}; expected YAML") from None
    jobs = [found for found in documents if isinstance(found, dict) and found.get("kind") == "RayJob"]
    wanted = [job for job in jobs if _stage_of(job) == stage.replace("_", "-")]
    if len(jobs) == 1 and _stage_of(jobs[0]) is None:
        wanted = jobs
    if len(wanted) != 1:
        raise ConfigError(
            f"{path} holds {len(wanted)} RayJobs for the stage {stage!r} (of {len(jobs)} in all); expected "
            "one RayJob, or "
            f"one with the label {STAGE_LABEL}, as `kubectl kustomize k8s/overlays/production-jobs` writes "
            "them"
        )
    return wanted[0]


def recipe_map_name(job_id: str) -> str:
    """The name of the ConfigMap of a job's recipe."""
    return f"{job_id}-recipe"


def build(
    submission: Submission, job_id: str, namespace: str, template: Mapping[str, Any], image: str | None = None
) -> dict[str, Any]:
    """The RayJob of a submission: the template with the stage's command, its recipe mounted, and what names
    it.

    A run directory that is not absolute is put on the disk that outlives the cluster, so that a retry, which
    is a new cluster, goes on. `image` replaces the template's image on all nodes.
    """
    job: dict[str, Any] = copy.deepcopy(dict(template))
    stage = submission.stage.replace("_", "-")
    metadata = job.setdefault("metadata", {})
    if metadata.get("name") == _TEMPLATE_NAME and stage == "loop":
        job["spec"]["activeDeadlineSeconds"] = _LOOP_DEADLINE_S
    metadata["name"], metadata["namespace"] = job_id, namespace
    metadata.setdefault("labels", {})[STAGE_LABEL] = stage
    metadata.setdefault("annotations", {}).update(
        {RECIPE_ANNOTATION: submission.recipe, CONTENT_ANNOTATION: submission.content}
    )
    job["spec"]["entrypoint"] = _entrypoint(submission)
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        pod = group["template"]
        pod.setdefault("metadata", {}).setdefault("labels", {})[STAGE_LABEL] = stage
        for container in pod["spec"]["containers"]:
            container["image"] = image or _tagged(container["image"])
    # The driver, which reads the recipe, runs on the head.
    head = groups[0]["template"]["spec"]
    head.setdefault("volumes", []).append(
        {"name": _RECIPE_VOLUME, "configMap": {"name": recipe_map_name(job_id)}}
    )
    head["containers"][0].setdefault("volumeMounts", []).append(
        {"name": _RECIPE_VOLUME, "mountPath": _RECIPE_DIRECTORY, "readOnly": True}
    )
    return job


def recipe_map(
    submission: Submission, job_id: str, namespace: str, owner_uid: str | None = None
) -> dict[str, Any]:
    """The ConfigMap of a job's recipe; it goes when the RayJob of `owner_uid` does."""
    metadata: dict[str, Any] = {
        "name": recipe_map_name(job_id),
        "namespace": namespace,
        "labels": {"app.kubernetes.io/name": "accord", "app.kubernetes.io/component": "job"},
    }
    if owner_uid is not None:
        owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "RayJob", "name": job_id, "uid": owner_uid}
        metadata["ownerReferences"] = [owner]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": {RECIPE_NAME: submission.recipe_text},
    }


def as_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """The objects as kubectl reads them."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Without aliases, and with texts of many lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _entrypoint(submission: Submission) -> str:
    run_dir = Path(submission.run_dir)
    directory = str(run_dir) if run_dir.is_absolute() else f"{_RUNS}/{run_dir.name}"
    return submission.command(f"{_RECIPE_DIRECTORY}/{RECIPE_NAME}", directory, "--address", "auto")


def _tagged(image: str) -> str:
    """Our template leaves the tag to kustomize, or to us: this version's."""
    return f"{image}:{accord.__version__}" if image == _TEMPLATE_IMAGE else image


def _stage_of(job: Mapping[str, Any]) -> str | None:
    """The stage of a built RayJob, by its pods' label (which ours have) or its own."""
    labels = job.get("metadata", {}).get("labels", {})
    pod = job.get("spec", {}).get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {})
    stage = labels.get(STAGE_LABEL) or pod.get("metadata", {}).get("labels", {}).get(STAGE_LABEL)
    return str(stage) if stage else None
