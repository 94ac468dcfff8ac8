"""`accord token`: make, list and revoke the bearer tokens that the services ask for."""

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from accord import tokens
from accord.cli.common import errors_shown, stderr, within
from accord.errors import TokenError

app = typer.Typer(help="Make, list and revoke the bearer tokens of the services.", no_args_is_help=True)

_File = Annotated[
    Path | None, typer.Option("--file", help="The token file; without it, the one of `accord serve`.")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it, for instance shop-web.")],
    scope: Annotated[
        list[str],
        typer.Option(help=f"What it may do; give it several times. One of {', '.join(tokens.SCOPES)}."),
    ],
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; without it, never.", callback=within(0))
    ] = None,
    file: _File = None,
) -> None:
    """Make a token and print it. It is shown this once: the file holds only its hash."""
    path = file or tokens.default_tokens_path()
    with errors_shown():
        token = tokens.add(path, name, scope, expires=_in_days(days))
    if sys.stdout.isatty():
        stderr().print(f"Token [bold]{name}[/], in {path}. Keep it now; it is not shown again:")
    typer.echo(token)


@app.command("list")
def list_tokens(file: _File = None) -> None:
    """Show names, scopes and expiry of all tokens."""
    path = file or tokens.default_tokens_path()
    with errors_shown():
        records = tokens.TokenFile.load(path).records
    table = Table("Name", "Scopes", "Expires", box=None, pad_edge=False)
    now = datetime.datetime.now(datetime.UTC)
    for record in records:
        when = f"{record.expires.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC" if record.expires else "never"
        table.add_row(record.name, ", ".join(record.scopes), when + (" (expired)" * record.expired(now)))
    Console(highlight=False).print(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The token's name, as `accord token list` shows it.")],
    file: _File = None,
) -> None:
    """Take a token out of the file. Services that read it refuse the token from then on."""
    path = file or tokens.default_tokens_path()
    with errors_shown():
        tokens.remove(path, name)
    stderr().print(f"Revoked {name} in {path}.")


def _in_days(days: float | None) -> datetime.datetime | None:
    if days is None:
        return None
    try:
        return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)).replace(microsecond=0)
    except OverflowError:
        raise TokenError(f"{days:g} days are beyond the calendar; leave --days out for no expiry") from None
