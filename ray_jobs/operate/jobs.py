"""What a job is, wherever it runs, and when two submissions are one job."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accord.errors import AccordError, ConfigError
from accord.recipe import load_recipe
from ray_jobs.stages import OUTPUTS

STAGES = ("loop", *OUTPUTS)
RECIPE_NAME = "recipe.yaml"
PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED = "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"
UNFINISHED = (PENDING, RUNNING)
# Kubernetes' rule for names; 47 is KubeRay's limit for a RayJob's, from which it makes those of pods.
_ID = re.compile(r"^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$")
_DIGEST_DIGITS = 12


class ClusterError(AccordError):
    """A cluster does not answer, does not let us, or does not hold what was asked for."""


@dataclass(frozen=True)
class Submission:
    """A stage of a recipe, to be run. `arguments` go on the stage's command line, beside recipe and run
    directory.
    """

    stage: str
    recipe: str
    recipe_text: str
    run_dir: str
    arguments: tuple[str, ...]
    id: str | None = None

    @property
    def content(self) -> str:
        """A digest of all that makes the job what it is."""
        whole = json.dumps([self.stage, self.recipe_text, self.run_dir, self.arguments])
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """The id without the number of the attempt, when none was given."""
        return f"accord-{self.stage.replace('_', '-')}-{self.content[:_DIGEST_DIGITS]}"

    def command(self, recipe_path: str, run_dir: str, *further: str) -> str:
        """The stage's command line, as a shell reads it."""
        words = ["python", "-m", f"ray_jobs.{self.stage}", "--recipe", recipe_path, "--run-dir", run_dir]
        return shlex.join([*words, *self.arguments, *further])


@dataclass(frozen=True)
class Job:
    """A job that a cluster knows. `content` is None where somebody else submitted it."""

    id: str
    stage: str
    recipe: str
    status: str
    content: str | None = None
    message: str = ""
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED


class Backend(Protocol):
    """A place where jobs run. All methods raise ClusterError, which says what to do."""

    @property
    def where(self) -> str:
        """The place, in words fit to be shown."""

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """The job, and whether it is new."""

    def jobs(self) -> list[Job]:
        """All jobs of Accord, the newest first."""

    def job(self, job_id: str) -> Job: ...

    def logs(self, job_id: str) -> str: ...

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Writes the job's output while it comes; the job when it has ended."""

    def stop(self, job_id: str) -> str:
        """What was done, in words."""


def make_submission(
    recipe: Path,
    stage: str = "loop",
    overrides: Sequence[str] = (),
    run_dir: str | None = None,
    job_id: str | None = None,
    further: Sequence[str] = (),
) -> Submission:
    """A submission of a recipe that was read and checked here, so that what is wrong with it is known now.

    Raises:
        ConfigError: no such stage or recipe, a bad value, or an id that no cluster takes.
    """
    stage = stage.replace("-", "_")
    if stage not in STAGES:
        raise ConfigError(f"there is no stage {stage!r}; expected one of {', '.join(STAGES)}")
    if job_id is not None and not _ID.match(job_id):
        raise ConfigError(
            f"{job_id!r} is no id for a job; expected at most 47 lower-case letters, digits and '-', a "
            "letter first"
        )
    settings = load_recipe(recipe, overrides)
    arguments = [part for override in overrides for part in ("--set", override)]
    text = recipe.read_text(encoding="utf-8")
    directory = run_dir or str(settings.run_dir)
    return Submission(stage, settings.name, text, directory, (*arguments, *further), job_id)


def same_job(submission: Submission, jobs: Sequence[Job]) -> Job | None:
    """The job that this submission is, among those that are there; None when it is to be started.

    Without an id, one that failed or was stopped is started again, and goes on from what it had done.

    Raises:
        ClusterError: its id was used for something else.
    """
    if submission.id is not None:
        found = next((job for job in jobs if job.id == submission.id), None)
        if found is not None:
            check_same(submission, found)
        return found
    # --fresh asks for the work anew, once it is done
    done = UNFINISHED if "--fresh" in submission.arguments else (*UNFINISHED, SUCCEEDED)
    return next((job for job in jobs if job.content == submission.content and job.status in done), None)


def check_same(submission: Submission, job: Job) -> None:
    """Raises ClusterError when the job of the submission's id was submitted with other content."""
    if job.content != submission.content:
        raise ClusterError(
            f"the id {job.id!r} was used for another job ({job.stage} of "
            f"{job.recipe or 'an unknown recipe'}, "
            f"{job.status}): recipe, stage or settings differ. Choose another --id, or leave it away"
        )


def new_id(submission: Submission, jobs: Sequence[Job]) -> str:
    """The id of a new job: the one that was given, or the next attempt's."""
    if submission.id is not None:
        return submission.id
    numbers = [
        int(number)
        for prefix, _, number in (job.id.rpartition("-") for job in jobs)
        if prefix == submission.prefix and number.isdigit()
    ]
    return f"{submission.prefix}-{max(numbers, default=0) + 1}"


def resolve(backend: Backend, target: str) -> str:
    """The id that is meant: `target` itself, or, of a recipe's file, that of its newest job.

    Raises:
        ConfigError: the recipe cannot be read. ClusterError: it has no job there.
    """
    if not target.endswith((".yaml", ".yml")):
        return target
    name = load_recipe(target).name
    found = next((job for job in backend.jobs() if job.recipe == name), None)
    if found is None:
        raise ClusterError(
            f"{backend.where} has no job of the recipe {name!r}; `accord job submit {target}` starts one"
        )
    return found.id


def no_such_job(job_id: str, where: str, jobs: Sequence[Job]) -> ClusterError:
    """The error that names the jobs that there are."""
    known = ", ".join(job.id for job in jobs[:5]) or "none"
    return ClusterError(
        f"there is no job {job_id!r} at {where}. Its newest jobs: {known}. `accord job list` shows all"
    )
