"""`python -m services.rollout.move`: what `accord models promote|rollback --serve FILE` becomes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from accord.cli.common import errors_shown, stderr, within
from accord.config import load_yaml
from accord.registry.registry import Registry
from accord.registry.settings import registry_uri
from services.rollout.config import RolloutConfig
from services.rollout.moves import Moved, Mover
from services.rollout.serving import open_serving
from services.rollout.sources import Gateway

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

ServeOption = Annotated[Path, typer.Option("--serve", dir_okay=False)]
WhyOption = Annotated[str, typer.Option("--why")]
ByOption = Annotated[str, typer.Option("--by")]
RegistryOption = Annotated[str | None, typer.Option("--registry")]


@app.command()
def promote(
    model: str,
    serve: ServeOption,
    why: WhyOption,
    by: ByOption,
    share: Annotated[float | None, typer.Option("--share", callback=within(0, 1))] = None,
    force: Annotated[bool, typer.Option("--force")] = False,
    registry: RegistryOption = None,
) -> None:
    """Make a registered version what serves, or with --share its canary."""
    with errors_shown():
        moved = _mover(serve, registry).promote(model, by=by, why=why, share=share, force=force)
        for check in moved.checks:
            typer.echo(f"  {check}")
        role = "champion" if share is None else f"canary, with {share:.0%} of the requests"
        typer.echo(f"{moved.version} serves as {role} ({moved.alias}): {_seconds(moved)}.")


@app.command()
def rollback(
    name: str,
    serve: ServeOption,
    why: WhyOption,
    by: ByOption,
    canary: Annotated[bool, typer.Option("--canary")] = False,
    to: Annotated[str | None, typer.Option("--to")] = None,
    registry: RegistryOption = None,
) -> None:
    """Serve the last good champion again, or take the canary out."""
    with errors_shown():
        mover = _mover(serve, registry)
        if canary:
            moved = mover.take_out_canary(name, by=by, why=why)
            typer.echo(f"No canary is served; {moved.alias} answers all requests: {_seconds(moved)}.")
            return
        moved = mover.rollback(name, by=by, why=why, to=to)
        typer.echo(f"{moved.version or moved.alias} serves again ({moved.alias}): {_seconds(moved)}.")


def _mover(serve: Path, registry: str | None) -> Mover:
    logging.getLogger("accord.client").setLevel(logging.WARNING)
    config = load_yaml(RolloutConfig, serve)
    given = registry or (config.registry.url.get_secret_value() if config.registry else None)
    console = stderr()
    return Mover(
        open_serving(config.serve),
        Gateway(config.gateway),
        Registry(registry_uri(given or None)),
        timeout_s=config.load_timeout_s,
        say=lambda text: console.print(f"{text} …", style="dim", markup=False, highlight=False),
    )


def _seconds(moved: Moved) -> str:
    loading = f"loaded in {moved.load_s:.1f} s, " if moved.load_s else ""
    return f"{loading}switched in {moved.switch_s:.1f} s"


def run() -> Any:
    return app(prog_name="accord models")


if __name__ == "__main__":
    run()
