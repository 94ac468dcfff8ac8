"""What the commands share: how an error is shown, and with which exit status they leave."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console

from accord.errors import AccordError

# What a user can mend; typer's own errors of usage leave with the same.
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


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
