"""The command line that all stages share, and how they end."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from accord.children import COMMAND
from accord.config import load_object
from accord.errors import ConfigError
from accord.guards.settings import JUDGEMENTS
from accord.recipe import Recipe, load_recipe
from accord.reward.settings import BUILT_IN_SCORERS
from ray_jobs import cluster, stages
from ray_jobs.progress import say

RecipeOption = Annotated[Path, typer.Option("--recipe", help="The run's YAML file.", dir_okay=False)]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value of the recipe.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run lives; by default the recipe's run_dir.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="A Ray cluster to join (auto, HOST:PORT, ray://HOST:PORT), or whose Jobs API gets the command "
        "(http://HOST:8265). By default Ray starts on this machine.",
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Starts this stage and those after it over. Images and people's votes stay."
    ),
]
STOPPING = (signal.SIGINT, signal.SIGTERM)


def main(name: str) -> None:
    """The command of `ray_jobs.NAME`: its `run(recipe, run_dir)` does the work, its docstring is the help.

    If it has an `afterwards(recipe, run_dir)`, that is called when Ray is left.
    The module is imported anew under its own name: what `__main__` defines could not be sent to a Ray worker.
    """
    module = importlib.import_module(f"ray_jobs.{name}")

    def command(
        recipe: RecipeOption,
        overrides: SetOption = [],  # noqa: B006 - typer reads the default and never changes it
        run_dir: RunDirOption = None,
        address: AddressOption = None,
        fresh: FreshOption = False,
    ) -> None:
        raise typer.Exit(guarded(lambda: _execute(name, module, recipe, overrides, run_dir, address, fresh)))

    command.__doc__ = module.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app(prog_name=f"accord {name.replace('_', '-')}")


def _execute(
    name: str,
    module: Any,
    recipe: Path,
    overrides: list[str],
    run_dir: Path | None,
    address: str | None,
    fresh: bool,
) -> int:
    settings = load_recipe(recipe, overrides)
    if cluster.is_job_address(address):
        from ray_jobs.operate.commands import run_as_job

        return run_as_job(str(address), name, recipe, overrides, run_dir, ["--fresh"] if fresh else [])
    directory = (run_dir or settings.run_dir).expanduser().resolve()
    _check(settings, directory)
    with stages.alone(directory):
        if fresh:
            stages.start_over(directory, name, settings)
        with cluster.connect(address):
            module.run(settings, directory)
    if afterwards := getattr(module, "afterwards", None):
        afterwards(settings, directory)
    return 0


def _check(recipe: Recipe, run_dir: Path) -> None:
    """What would stop a later stage, and can be known now, is an error now."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is a file; --run-dir names the directory that the run lives in")
    sources = [part.source for part in (recipe.pretraining, recipe.reference) if part is not None]
    guards = recipe.finetune.guards
    plugs = [] if guards is None else [guards.held_out, *guards.measures.values()]
    plugs += [term.scorer for term in recipe.rewards if term.scorer not in BUILT_IN_SCORERS]
    for spec in (recipe.evaluator, recipe.panel, *sources, *plugs):
        if spec is not None and spec != JUDGEMENTS:
            load_object(spec)


def guarded(work: Callable[[], int]) -> int:
    """The exit code: 2 with one message for what the user can mend, 130 for Ctrl-C. A bug is raised."""
    _quieten()
    # Ctrl-C means this even where the parent ignores it (nohup, a script's background job), for Python then
    # installs no handler. What an orchestrator sends means the same.
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOPPING}
    try:
        return work()
    except KeyboardInterrupt:
        say(f"\nStopped. Nothing is lost; go on with the same command:\n  {_own_command()}")
        return 130
    except Exception as error:
        known = cluster.accord_error(error)
        if known is None:
            raise
        say(f"Error: {known}")
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _own_command() -> str:
    """What was typed: `accord STAGE`, which became this process, or this module itself."""
    typed = os.environ.get(COMMAND)
    words = (
        shlex.split(typed) if typed else ["python", "-m", f"ray_jobs.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    )
    return shlex.join(word for word in words if word != "--fresh")


def _quieten() -> None:
    """What libraries tell their developers is not for our users."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for library in ("transformers", "diffusers", "mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.ERROR)
