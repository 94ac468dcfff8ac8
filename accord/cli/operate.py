"""`accord job` and `accord status`, which become `python -m ray_jobs.operate`; that one needs Ray."""

import sys

import typer

from accord.children import become
from accord.cli.common import PASS_ON

app = typer.Typer()


@app.command(context_settings=PASS_ON, rich_help_panel="Operating")
def job(context: typer.Context) -> None:
    """Submit, list, follow and stop jobs on a Ray cluster or on Kubernetes."""
    become("ray_jobs.operate", ["job", *context.args])


@app.command(context_settings=PASS_ON, rich_help_panel="Operating")
def status(context: typer.Context) -> None:
    """Services, jobs, models in service and feedback waiting."""
    become("ray_jobs.operate", ["status", *context.args])


@app.command(context_settings=PASS_ON, rich_help_panel="Operating")
def models(context: typer.Context) -> None:
    """Registered models: list, show, register, promote, roll back, and what each was made from."""
    from accord.registry.commands import app as commands

    sys.exit(commands(context.args, prog_name="accord models"))
