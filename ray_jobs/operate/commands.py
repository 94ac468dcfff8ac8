"""The command line of `accord job` and `accord status`."""

from __future__ import annotations

import datetime
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from accord.cli.common import within
from accord.config import DATABASE_VARIABLE
from accord.errors import AccordError, ConfigError
from ray_jobs.operate import jobs
from ray_jobs.operate.jobs import STAGES, Backend, Job, make_submission, resolve

DEFAULT_NAMESPACE = "accord"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
job_app = typer.Typer(no_args_is_help=True, help="Jobs on a Ray cluster, or on Kubernetes.")
app.add_typer(job_app, name="job")

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", envvar="ACCORD_JOBS_ADDRESS", help="Jobs API of a Ray cluster: http://HOST:8265."
    ),
]
KubernetesOption = Annotated[
    bool, typer.Option("--kubernetes", help="As RayJobs, on the cluster of your kubeconfig.")
]
NamespaceOption = Annotated[str, typer.Option("--namespace", "-n", help="With --kubernetes.")]
ContextOption = Annotated[
    str | None, typer.Option("--context", help="Of the kubeconfig; by default its current one.")
]
TargetArgument = Annotated[str, typer.Argument(help="A job's id, or a recipe's file: its newest job.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Prints JSON.")]


@job_app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="The run's YAML file.", dir_okay=False)],
    stage: Annotated[str, typer.Option("--stage", help=f"One of {', '.join(STAGES)}.")] = "loop",
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value of the recipe.")
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="On the cluster; by default the recipe's run_dir.")
    ] = None,
    job_id: Annotated[
        str | None, typer.Option("--id", help="The same id twice is one job; by default made of the content.")
    ] = None,
    address: AddressOption = None,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    context: ContextOption = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="RayJob to start from, as kubectl kustomize writes it.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="With --kubernetes: the image of all nodes.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follows the log until the job ends.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prints the YAML, and submits nothing.")] = False,
) -> None:
    """Submit a stage of a recipe, once: the same recipe and settings again are the same job."""

    def work() -> int:
        submission = make_submission(recipe, stage, overrides, run_dir, job_id)
        if dry_run:
            typer.echo(_as_yaml(submission, address, kubernetes, namespace, template, image), nl=False)
            return 0
        return _submit(_backend(address, kubernetes, namespace, context, template, image), submission, follow)

    raise typer.Exit(guarded(work))


@job_app.command("list")
def list_jobs(
    address: AddressOption = None,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    context: ContextOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the jobs, the newest first."""

    def work() -> int:
        backend = _backend(address, kubernetes, namespace, context)
        found = backend.jobs()
        if as_json:
            typer.echo(json.dumps([vars(job) for job in found], indent=2, default=_json))
        elif not found:
            typer.echo(f"No jobs at {backend.where}. `accord job submit RECIPE` starts one.")
        else:
            typer.echo("\n".join(table(found)))
        return 0

    raise typer.Exit(guarded(work))


@job_app.command()
def logs(
    job: TargetArgument,
    address: AddressOption = None,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    context: ContextOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Goes on until the job ends.")] = False,
) -> None:
    """Show what a job has written."""

    def work() -> int:
        backend = _backend(address, kubernetes, namespace, context)
        job_id = resolve(backend, job)
        if follow:
            return _follow(backend, job_id)
        typer.echo(backend.logs(job_id), nl=False)
        return 0

    raise typer.Exit(guarded(work))


@job_app.command()
def stop(
    job: TargetArgument,
    address: AddressOption = None,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    context: ContextOption = None,
) -> None:
    """Stop a job; what it has finished stays, and submitting it again goes on from there."""

    def work() -> int:
        backend = _backend(address, kubernetes, namespace, context)
        typer.echo(backend.stop(resolve(backend, job)))
        return 0

    raise typer.Exit(guarded(work))


@app.command()
def status(
    address: AddressOption = None,
    kubernetes: KubernetesOption = False,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    context: ContextOption = None,
    registry: Annotated[
        str | None, typer.Option("--registry", help="MLflow registry; by default as `accord models` has it.")
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(
            "--feedback",
            envvar=DATABASE_VARIABLE,
            show_envvar=True,
            help="Store of judgements: SQLAlchemy URL, or env:NAME.",
        ),
    ] = None,
    judgements_per_image: Annotated[
        int, typer.Option("--judgements-per-image", callback=within(1), help="How many an image needs.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show services, jobs, models in service and feedback waiting; parts that do not answer are named."""

    def work() -> int:
        from ray_jobs.operate.status import Sources, look, render

        sources = Sources(address, kubernetes, namespace, context, registry, feedback, judgements_per_image)
        parts = look(sources)
        typer.echo(json.dumps(parts, indent=2, default=_json) if as_json else "\n".join(render(parts)))
        return 0

    raise typer.Exit(guarded(work))


def run_as_job(
    address: str,
    stage: str,
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    further: Sequence[str] = (),
) -> int:
    """Runs `python -m ray_jobs.STAGE` on a cluster by its Jobs API and follows its log; its exit code."""
    directory = None if run_dir is None else str(run_dir)
    submission = make_submission(recipe, stage, overrides, directory, further=further)
    return _submit(_backend(address), submission, follow=True)


def table(found: Sequence[Job]) -> list[str]:
    """Jobs as lines of text, with a header."""
    rows = [("ID", "STAGE", "RECIPE", "STATUS", "STARTED", "TOOK")]
    for job in found:
        started = job.started.strftime("%Y-%m-%d %H:%M") if job.started else "-"
        rows.append((job.id, job.stage, job.recipe or "-", job.status, started, _took(job)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def guarded(work: Callable[[], int]) -> int:
    """The exit code: 2 with one message for what the user can mend, 130 for Ctrl-C. A bug is raised."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except AccordError as error:
        typer.echo(f"Error: {error}", err=True)
        return 2


def _submit(backend: Backend, submission: jobs.Submission, follow: bool) -> int:
    job, new = backend.submit(submission)
    if new:
        typer.echo(f"Submitted the job {job.id} to {backend.where}.", err=True)
    else:
        typer.echo(f"The job {job.id} is there already: {job.status} ({backend.where}).", err=True)
        if job.is_finished and not follow:
            typer.echo("To run it once more, give it another --id.", err=True)
    if follow:
        return _follow(backend, job.id)
    typer.echo(job.id)
    return 0


def _follow(backend: Backend, job_id: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = backend.follow(job_id, write)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe job {job_id} goes on. The same command follows it again; `accord job stop {job_id}` "
            "stops it.",
            err=True,
        )
        return 130
    typer.echo(f"The job {job_id} ended: {job.status}. {job.message}".rstrip(), err=True)
    return 0 if job.status == jobs.SUCCEEDED else 1


def _backend(
    address: str | None,
    kubernetes: bool = False,
    namespace: str = DEFAULT_NAMESPACE,
    context: str | None = None,
    template: Path | None = None,
    image: str | None = None,
) -> Backend:
    """Where jobs run. Raises ConfigError when that was not said; ClusterError when it does not answer."""
    if kubernetes:
        from ray_jobs.operate.kube import Kubernetes

        return Kubernetes(namespace, context, template, image)
    if address is None:
        raise ConfigError(
            "where? Give --address http://HOST:8265 (or ACCORD_JOBS_ADDRESS) for a Ray cluster, or "
            "--kubernetes"
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address is {address!r}; expected the Jobs API of a Ray cluster, http://HOST:8265"
        )
    from ray_jobs.operate.ray_api import RayApi

    return RayApi(address)


def _as_yaml(
    submission: jobs.Submission,
    address: str | None,
    kubernetes: bool,
    namespace: str,
    template: Path | None,
    image: str | None,
) -> str:
    """What would be sent: the objects for Kubernetes, unless an address of a Ray cluster is given."""
    if address is not None and not kubernetes:
        from ray_jobs.operate.ray_api import request

        return yaml.safe_dump(request(submission), sort_keys=False, allow_unicode=True)
    from ray_jobs.operate import kube, rayjob

    return rayjob.as_yaml(kube.objects(submission, namespace, template, image))


def _took(job: Job) -> str:
    if job.started is None:
        return "-"
    until = job.ended or datetime.datetime.now(datetime.UTC)
    return str(datetime.timedelta(seconds=max(0, int((until - job.started).total_seconds()))))


def _json(value: object) -> str:
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
