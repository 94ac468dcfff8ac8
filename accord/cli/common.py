"""What the commands share: how an error is shown, and with which exit status they leave."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from accord.errors import AccordError, ConfigError

# What a user can mend; typer's own errors of usage leave with the same.
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130

# For a command that becomes another program: all options go there as they are, --help too.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there already under the same name.")
]


def stderr() -> Console:
    """The console for what is not the command's result."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Turns an error that Accord raises on purpose into one line and an exit status."""
    try:
        yield
    except AccordError as error:
        console = stderr()
        console.print("[bold red]Error:[/] ", end="")
        console.print(str(error), markup=False)
        raise typer.Exit(getattr(error, "exit_status", USAGE_STATUS)) from None
    except KeyboardInterrupt:
        stderr().print("Stopped.")
        raise typer.Exit(INTERRUPTED_STATUS) from None


def within(least: float, most: float | None = None) -> Callable[[Any], Any]:
    """An option's callback: its error names the option, the value and what it may be (typer's not all)."""
    expected = f"{least} or more" if most is None else f"{least} to {most}"

    def check(value: Any) -> Any:
        if value is not None and not (least <= value and (most is None or value <= most)):
            raise typer.BadParameter(f"{value} is out of range; expected {expected}")
        return value

    return check


def refuse_to_overwrite(files: Iterable[Path], overwrite: bool) -> None:
    """Before any work is done. Raises ConfigError: one of the files is there, and nobody said --overwrite."""
    there = [] if overwrite else [path for path in files if path.exists() or path.is_symlink()]
    if there:
        others = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise ConfigError(f"{there[0]}{others} is there already: name another place, or give --overwrite")


def refuse_to_replace(directory: Path, kind: str, overwrite: bool) -> None:
    """An artifact is replaced as a whole, so a folder that holds something else never is.

    Raises:
        ConfigError: it holds something else, or what is to be replaced and nobody said --overwrite.
    """
    from accord.artifacts import read_manifest

    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        known = read_manifest(directory).kind == kind
    except AccordError:
        known = False
    if not known:
        raise ConfigError(
            f"{directory} holds something else than a {kind.replace('_', ' ')}: name another place"
        )
    refuse_to_overwrite([directory], overwrite)
