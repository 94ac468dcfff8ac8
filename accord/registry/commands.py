"""`accord models`: what there is, what serves, who decided so, and what it was made from."""

from __future__ import annotations

import functools
import getpass
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

from accord.children import become
from accord.cli.common import within
from accord.errors import AccordError, ConfigError

if TYPE_CHECKING:  # MLflow takes seconds to import
    from accord.registry.lineage import Lineage
    from accord.registry.registry import ModelVersion, Registry

P = ParamSpec("P")

app = typer.Typer(no_args_is_help=True, help="Registered models: what serves, and what it was made from.")

RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help="MLflow registry URI, or env:NAME; by default $MLFLOW_REGISTRY_URI, the recipe's, else SQLite "
        "in runs/.",
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="NAME/VERSION, NAME@ALIAS, or the first digits of a digest.")
]
ByOption = Annotated[
    str | None, typer.Option("--by", help="Who decides; by default the user of this machine.")
]
WhyOption = Annotated[str, typer.Option("--why", help="What speaks for it; it goes on record.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Prints JSON.")]
ServeOption = Annotated[
    Path | None,
    typer.Option(
        "--serve",
        help="Moves the traffic too: a file that says what serves, as `accord serve --manage` writes it "
        "(docs/operate.md).",
        dir_okay=False,
    ),
]


def _errors(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that a user can mend become one message and exit code 2."""

    @functools.wraps(command)
    def guarded(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except AccordError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None

    return guarded


_NOT_SERVED = " What serves is what the Serve config names: --serve FILE moves that too."
_SHARE = 0.1  # of the requests, for a canary of which nothing else is said


@app.command()
@_errors
def register(
    recipe: Annotated[Path, typer.Argument(help="The run's YAML file.", dir_okay=False)],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replaces a value of the recipe.")
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="By default the recipe's run_dir.")
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Register the reward and the diffusion model of a run; again, after it was evaluated anew."""
    from accord.recipe import load_recipe
    from accord.registry.runs import find_models
    from accord.registry.settings import registry_uri

    settings = load_recipe(recipe, overrides)
    models = find_models(run_dir or settings.run_dir)
    opened = _open(registry_uri(registry, settings.registry))
    for model in models:
        version, new = opened.register(settings.registry.name, model, settings.name, settings.registry.gate)
        failed = [check for check in version.checks() if not check.passed]
        state = "passes its gate" if not failed else f"does not pass its gate ({failed[0].name})"
        typer.echo(
            f"{version}  {version.digest[:12]}  {'registered' if new else 'was there, updated'}; {state}"
        )


@app.command("list")
@_errors
def list_models(registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """List all versions, with what serves."""
    versions = _registry(registry).versions()
    if as_json:
        typer.echo(json.dumps([_plain(version) for version in versions], indent=2))
        return
    if not versions:
        typer.echo("No models are registered. `accord models register RECIPE` adds those of a run.")
        return
    rows = [("MODEL", "SERVES AS", "DIGEST", "RECIPE", "GATE", "REGISTERED")]
    for version in versions:
        passed = all(check.passed for check in version.checks())
        when = version.registered_at.strftime("%Y-%m-%d %H:%M")
        aliases = ", ".join(version.aliases) or "-"
        rows.append(
            (str(version), aliases, version.digest[:12], version.recipe, "pass" if passed else "fail", when)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
@_errors
def show(model: ModelArgument, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Show one version: what it is, what its gate says, and what became of it."""
    opened = _registry(registry)
    version = opened.get(model)
    events = opened.history(version.name)
    if as_json:
        typer.echo(json.dumps({**_plain(version), "history": [vars(event) for event in events]}, indent=2))
        return
    typer.echo(f"{version}  {', '.join(version.aliases) or 'does not serve'}")
    for name in ("kind", "digest", "directory", "recipe", "code_version"):
        typer.echo(f"  {name:<13}{getattr(version, name)}")
    for name, digest in version.ancestors.items():
        typer.echo(f"  made from    {name} {digest[:12]}")
    typer.echo("Gate:")
    for check in version.checks():
        typer.echo(f"  {check}")
    typer.echo(f"History of {version.name}:" if events else f"No alias of {version.name} was ever moved.")
    for event in events:
        target = "nothing" if event.version is None else f"version {event.version}"
        forced = " (gate not passed)" if event.forced else ""
        moved = f"{event.alias} is {target}" if event.alias else f"{target} again"
        typer.echo(f"  {event.at}  {event.action}: {moved}{forced}, by {event.by}: {event.why}")


@app.command()
@_errors
def promote(
    model: ModelArgument,
    why: WhyOption,
    canary: Annotated[
        bool, typer.Option("--canary", help="As canary, which a share of requests should reach first.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although its gate fails; that goes on record.")
    ] = False,
    share: Annotated[
        float | None,
        typer.Option(
            "--share", callback=within(0, 1), help="With --serve: the canary's share of the requests, 0 to 1."
        ),
    ] = None,
    serve: ServeOption = None,
    by: ByOption = None,
    registry: RegistryOption = None,
) -> None:
    """Make a version the champion, if it passes the gate of its recipe."""
    from accord.registry.records import CANARY, CHAMPION

    if share is not None and not (canary and serve):
        raise ConfigError("--share is that of a canary that serves: give --canary and --serve FILE too")
    if serve is not None:
        options = ["--share", str(_SHARE if share is None else share)] if canary else []
        _move(["promote", model, *options, *(["--force"] if force else [])], serve, why, by, registry)
    alias = CANARY if canary else CHAMPION
    version, checks = _registry(registry).promote(model, by=by or _user(), why=why, alias=alias, force=force)
    for check in checks:
        typer.echo(f"  {check}")
    typer.echo(f"{version} is now {alias} in the registry.{_NOT_SERVED}")


@app.command()
@_errors
def rollback(
    name: Annotated[str, typer.Argument(help="The model's name, such as accord-diffusion.")],
    why: WhyOption,
    canary: Annotated[
        bool, typer.Option("--canary", help="Take the canary out; the champion stays.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="With --serve: another alias that is served, such as a base model, never registered."
        ),
    ] = None,
    serve: ServeOption = None,
    by: ByOption = None,
    registry: RegistryOption = None,
) -> None:
    """Return to the last good champion, or take the canary out."""
    from accord.registry.records import CANARY, CHAMPION

    if to is not None and (canary or serve is None):
        raise ConfigError("--to names what is to serve in the champion's place: give --serve FILE too")
    if serve is not None:
        options = ["--canary"] if canary else ["--to", to] if to else []
        _move(["rollback", name, *options], serve, why, by, registry)
    alias = CANARY if canary else CHAMPION
    version = _registry(registry).rollback(name, by=by or _user(), why=why, alias=alias)
    moved = f"{version} is {alias} again" if version else f"{name} has no canary any more"
    typer.echo(f"{moved} in the registry.{_NOT_SERVED}")


@app.command()
@_errors
def lineage(
    what: Annotated[
        str,
        typer.Argument(
            help="A served image (PNG, or its manifest as JSON), a digest, NAME/VERSION or NAME@ALIAS."
        ),
    ],
    runs: Annotated[
        list[Path], typer.Option("--runs", help="Directories to look for runs in; by default runs/.")
    ] = [Path("runs")],  # noqa: B006 - typer reads the default and never changes it
    forward: Annotated[
        bool, typer.Option("--forward", help="What was made from it, not what it was made from.")
    ] = False,
    rater: Annotated[
        bool, typer.Option("--rater", help="WHAT is a rater: what his judgements went into.")
    ] = False,
    registry: RegistryOption = None,
) -> None:
    """Walk from a served image or a model back to the votes behind it, or forward to what was made from
    it."""
    from accord.registry.lineage import Lineage

    scanned = Lineage.scan(runs)
    served = _served(scanned, registry)
    if rater:
        _affected(what, runs, served)
        return
    for digest in _digests(what, scanned, registry):
        for step in scanned.forward(digest) if forward else scanned.back(digest):
            serving = f"  [{served[step.digest]}]" if step.digest in served else ""
            typer.echo(f"{step}{serving}")
            if (
                step.manifest is not None
                and step.manifest.kind == "feedback_snapshot"
                and step.path is not None
            ):
                for line in _votes(step.path):
                    typer.echo("  " * (step.depth + 1) + line)


def _digests(what: str, scanned: Lineage, registry: str | None) -> list[str]:
    """The digests that the argument means: an image has its model's and its reward's."""
    from accord.registry.lineage import image_models

    if Path(what).suffix.lower() in (".png", ".json"):
        return [scanned.find(digest) for digest in image_models(what).values()]
    if "@" in what or "/" in what:
        return [scanned.find(_registry(registry).get(what).digest)]
    return [scanned.find(what)]


def _served(scanned: Lineage, registry: str | None) -> dict[str, str]:
    """digest -> "NAME/VERSION alias" of what is registered; empty when no registry is there to ask."""
    from accord.registry.settings import registry_uri

    uri = registry_uri(registry)
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        return {}
    return {
        version.digest: " ".join((str(version), *version.aliases))
        for version in _open(uri).versions()
        if version.digest in scanned.artifacts
    }


def _votes(snapshot: Path) -> list[str]:
    """Lines of who judged, how often."""
    from accord.registry.lineage import judgements_by_rater

    counts = judgements_by_rater(snapshot)
    if not counts:
        return ["(this snapshot is of a version that did not note who judged)"]
    lines = [f"{sum(counts.values())} judgements by {len(counts)} raters"]
    return [*lines, *(f"{count:>6}  {rater}" for rater, count in sorted(counts.items()))]


def _affected(rater: str, runs: list[Path], served: dict[str, str]) -> None:
    """Prints what a rater's judgements went into."""
    from accord.feedback.lineage import affected_by

    for root in runs:
        found = affected_by(rater, root)
        for item in found.affected:
            serving = f"  [{served[item.digest]}]" if item.digest in served else ""
            typer.echo(
                f"{item.kind.replace('_', ' ')} {item.digest[:12]}  {item.path}  {item.because}{serving}"
            )
        for path, why in found.unknown:
            typer.echo(f"not known: {path}: {why}")
        if not found.affected:
            typer.echo(f"{rater!r} judged nothing that went into an artifact below {root}.")


def _move(command: list[str], serve: Path, why: str, by: str | None, registry: str | None) -> NoReturn:
    """Becomes the process that may speak gRPC and ask Serve or Kubernetes."""
    options = ["--serve", str(serve), "--why", why, "--by", by or _user()]
    options += ["--registry", registry] if registry else []
    become("services.rollout.move", [*command, *options])


def _registry(uri: str | None) -> Registry:
    from accord.registry.settings import registry_uri

    return _open(registry_uri(uri))


def _open(uri: str) -> Registry:
    from accord.registry.registry import Registry

    return Registry(uri)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _plain(version: ModelVersion) -> dict[str, Any]:
    plain = {**vars(version), "gate": version.gate.model_dump(mode="json")}
    plain["registered_at"] = version.registered_at.isoformat()
    plain["checks"] = [vars(check) for check in version.checks()]
    return plain
