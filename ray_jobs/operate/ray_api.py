"""Jobs by a Ray cluster's Jobs API (http://HOST:8265)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accord.config import redact_url
from accord.errors import AccordError
from ray_jobs.cluster import prepare_environment
from ray_jobs.operate.jobs import (
    RECIPE_NAME,
    ClusterError,
    Job,
    Submission,
    check_same,
    new_id,
    no_such_job,
    same_job,
)

_CHECK_EVERY_S = 10.0  # while no line comes: is the cluster still there?
_RECONNECT_AFTER_S = 1.0
# Behind this, Ray's message on a failed job repeats the end of its log.
_LOGS_IN_MESSAGE = ", last available logs"
_NO_AGENT = "No available agent"
_NO_AGENT_HINT = (
    " Its head has just started, or another Ray of that machine has its agent's port: then start it with "
    "`ray start --head --dashboard-agent-listen-port=PORT`"
)
# Ray would take these addresses rather than the one that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def request(submission: Submission) -> dict[str, Any]:
    """What the first attempt of a submission sends, for --dry-run; the working directory as its files."""
    return {
        "submission_id": new_id(submission, []),
        "entrypoint": _entrypoint(submission),
        "runtime_env": {"working_dir": {RECIPE_NAME: submission.recipe_text}},
        "metadata": _metadata(submission),
    }


def _entrypoint(submission: Submission) -> str:
    """The job works in a directory of its own, which goes with the cluster: the run's must not lie there."""
    return submission.command(RECIPE_NAME, str(Path(submission.run_dir).expanduser().absolute()))


def _metadata(submission: Submission) -> dict[str, str]:
    return {
        "accord.stage": submission.stage,
        "accord.recipe": submission.recipe,
        "accord.content": submission.content,
    }


class _Output:
    """Writes each part of a job's output once, however often it is told."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    def add(self, text: str, start: int) -> None:
        """`text` is what comes after the first `start` characters."""
        new = text[max(0, self._written - start) :]
        if new:
            self._write(new)
        self._written = max(self._written, start + len(text))


class RayApi:
    """Jobs on one Ray cluster. The recipe is uploaded; the code is that of the cluster's image."""

    def __init__(self, address: str) -> None:
        """Connects to the Jobs API at "http://HOST:PORT".

        Raises:
            ClusterError: nothing answers there, or it wants another token.
        """
        prepare_environment()
        self.address = address.rstrip("/")
        self.where = redact_url(self.address)
        with self._errors(), _without_other_addresses():
            from ray.job_submission import JobSubmissionClient

            self._client: Any = JobSubmissionClient(self.address)

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """The job, and whether it is new. The same submission twice is one job.

        Raises:
            ClusterError: the id was used for something else, or the cluster does not answer.
        """
        jobs = self.jobs()
        found = same_job(submission, jobs)
        if found is not None:
            return found, False
        job_id = new_id(submission, jobs)
        with self._errors(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / RECIPE_NAME).write_text(submission.recipe_text, encoding="utf-8")
            try:
                self._client.submit_job(
                    entrypoint=_entrypoint(submission),
                    submission_id=job_id,
                    runtime_env={"working_dir": folder},
                    metadata=_metadata(submission),
                )
            except RuntimeError:  # 500, also when another was faster with the same id
                there = next((job for job in self.jobs() if job.id == job_id), None)
                if there is None:
                    raise
                check_same(submission, there)
                return there, False
        return self.job(job_id), True

    def jobs(self) -> list[Job]:
        """All jobs that were submitted to the cluster, the newest first."""
        with self._errors():
            found = [details for details in self._client.list_jobs() if details.submission_id]
        found.sort(key=lambda details: details.start_time or 0, reverse=True)
        return [_job(details) for details in found]

    def job(self, job_id: str) -> Job:
        """Raises ClusterError when there is none of that id."""
        with self._errors(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that the job has written."""
        self.job(job_id)
        with self._errors(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Writes what the job has written, and goes on until it ends; the job then.

        Raises:
            ClusterError: the cluster went away meanwhile.
        """
        self.job(job_id)
        output = _Output(write)
        while True:
            with contextlib.suppress(
                Exception
            ):  # a lost connection; whether the cluster is lost is asked below
                asyncio.run(self._tail(job_id, output))
            job = self._while_it_ran(job_id)
            if job.is_finished:
                output.add(self.logs(job_id), start=0)
                return job
            time.sleep(_RECONNECT_AFTER_S)

    def stop(self, job_id: str) -> str:
        """Stops the job; one that has ended stays as it is."""
        job = self.job(job_id)
        if job.is_finished:
            return f"{job_id} had ended already: {job.status}"
        with self._errors(job_id):
            self._client.stop_job(job_id)
        return f"{job_id} is being stopped; what it finished is kept. Submit it again to go on."

    def serve_details(self) -> dict[str, Any]:
        """The applications of Ray Serve by name, as its REST API tells them; empty when none was deployed."""
        with self._errors():
            answer = self._client._do_request("GET", "/api/serve/applications/")
            if answer.status_code != 200:
                raise RuntimeError(f"status code {answer.status_code}: {answer.text[:200]}")
            applications: dict[str, Any] = answer.json().get("applications") or {}
        return applications

    async def _tail(self, job_id: str, output: _Output) -> None:
        """Each connection tells the output from its beginning."""
        told = 0
        lines = self._client.tail_job_logs(job_id).__aiter__()
        waiting = asyncio.ensure_future(lines.__anext__())
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=_CHECK_EVERY_S)
                if not done:
                    await asyncio.to_thread(self._while_it_ran, job_id)
                    continue
                text = waiting.result()
                output.add(text, start=told)
                told += len(text)
                waiting = asyncio.ensure_future(lines.__anext__())
        except StopAsyncIteration:
            return
        finally:
            waiting.cancel()

    def _while_it_ran(self, job_id: str) -> Job:
        try:
            return self.job(job_id)
        except ClusterError as error:
            raise ClusterError(
                f"the cluster went away while the job {job_id} ran: {error}\n"
                "What the job had finished is in its run directory. When the cluster is there again, give "
                "the same "
                "command: a new cluster starts the job again, and it goes on from there"
            ) from None

    @contextlib.contextmanager
    def _errors(self, job_id: str = "") -> Iterator[None]:
        """Ray's and the network's errors, as ours."""
        try:
            yield
        except AccordError:
            raise
        except Exception as error:
            raise self._translated(error, job_id) from None

    def _translated(self, error: Exception, job_id: str) -> ClusterError:
        from ray.exceptions import AuthenticationError

        text = redact_url(str(error)).strip()
        if isinstance(error, AuthenticationError):
            return ClusterError(
                f"the Ray cluster at {self.where} does not let us in: {text.splitlines()[0]}. Set "
                "RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
            )
        if job_id and "status code 404" in text:
            with contextlib.suppress(ClusterError):
                return no_such_job(job_id, self.where, self.jobs())
        if isinstance(error, OSError):  # the builtin ConnectionError and all of requests' errors are
            return ClusterError(
                f"no Ray Jobs API answers at {self.where} "
                f"({text.splitlines()[0][:200] if text else 'no answer'}). "
                "Start a cluster with `ray start --head`, forward the port of one on Kubernetes (kubectl "
                "port-forward "
                "service/HEAD 8265), or name another --address"
            )
        if isinstance(error, RuntimeError):
            hint = _NO_AGENT_HINT if _NO_AGENT in text else ""
            return ClusterError(f"the Ray cluster at {self.where} refused: {text[:500]}{hint}")
        raise error


@contextlib.contextmanager
def _without_other_addresses() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    command = str(details.entrypoint or "").split()
    module = next((word for word in command if word.startswith("ray_jobs.")), "")
    return Job(
        id=str(details.submission_id),
        stage=metadata.get("accord.stage") or module.removeprefix("ray_jobs.") or "-",
        recipe=metadata.get("accord.recipe", ""),
        status=str(getattr(details.status, "value", details.status)),
        content=metadata.get("accord.content"),
        message=str(details.message or "").partition(_LOGS_IN_MESSAGE)[0].strip(),
        started=_time(details.start_time),
        ended=_time(details.end_time),
    )


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC) if milliseconds else None
