"""`accord feedback`: campaigns, raters, snapshots and judgements of a feedback store, from a terminal."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from accord.children import become
from accord.cli.common import PASS_ON, OverwriteOption, refuse_to_overwrite, refuse_to_replace, within
from accord.config import DATABASE_VARIABLE
from accord.errors import AccordError, FeedbackError

if TYPE_CHECKING:
    from accord.feedback.campaign_records import Progress

# What the commands need is imported when they run: `accord --help` stays quick.

UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar=DATABASE_VARIABLE,
        help="SQLAlchemy URL of the feedback store.",
        show_default=False,
    ),
]
CampaignArgument = Annotated[str, typer.Argument(help="The campaign's id.")]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="parquet, jsonl, csv or imagefolder; by default as the path says."),
]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="The folder that keeps images by digest.")
]

_SHOWN = 20
_BAD_ROWS = 1  # exit status
_ERROR = 2

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
campaign_app = typer.Typer(help="Make and list campaigns.", no_args_is_help=True)
app.add_typer(campaign_app, name="campaign")


_out = Console(soft_wrap=True, highlight=False)


@app.command(context_settings=PASS_ON)
def serve(context: typer.Context) -> None:
    """Serve the rating page, gRPC and metrics until Ctrl-C or SIGTERM."""
    become("services.feedback", ["serve", *context.args])


@app.command(context_settings=PASS_ON)
def invite(context: typer.Context) -> None:
    """Make an invite link to the rating page for each rater."""
    become("services.feedback", ["invite", *context.args])


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors that a user can mend are one line, and the exit status is 2."""
    try:
        yield
    except AccordError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("[bold red]Error:[/] ", end="")
        console.print(str(error), markup=False)
        raise typer.Exit(_ERROR) from None


@campaign_app.command("create")
def create(
    campaign: CampaignArgument,
    url: UrlOption,
    title: Annotated[str, typer.Option(help="What raters see as its name.")],
    judgements: Annotated[
        int,
        typer.Option(help="Judgements wanted of every item, each by another rater.", callback=within(1, 25)),
    ] = 3,
    source: Annotated[list[str], typer.Option(help="Digest of an artifact whose images are judged.")] = [],  # noqa: B006
    images_per_task: Annotated[
        int, typer.Option(help="Images of one prompt shown together: 1 to 9.", callback=within(1, 9))
    ] = 3,
    lease_s: Annotated[float, typer.Option(help="Seconds that a rater may take for a task.")] = 600,
    gold: Annotated[
        Path | None, typer.Option(help="JSON lines of known answers: image, prompt, verdict.")
    ] = None,
    comparison: Annotated[
        Path | None,
        typer.Option(
            help="Compare instead: JSON lines of prompt, first, second (lists of digests), category."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of tasks.", callback=within(0, 2**63 - 1))] = 0,
) -> None:
    """Make a campaign from the images in the store. Again with the same arguments: the same campaign."""
    from accord.feedback import Campaigns, ComparisonItem, Gold

    with _errors(), Campaigns(url) as campaigns:
        if comparison is not None:
            items = [_record(ComparisonItem, row, comparison, n) for n, row in _json_lines(comparison)]
            made = campaigns.create_comparison(
                campaign, title, items, judgements_per_item=judgements, lease_s=lease_s, seed=seed
            )
        else:
            known = [] if gold is None else [_record(Gold, row, gold, n) for n, row in _json_lines(gold)]
            made = campaigns.create_alignment(
                campaign,
                title,
                judgements_per_item=judgements,
                sources=source,
                images_per_task=images_per_task,
                lease_s=lease_s,
                gold=known,
                seed=seed,
            )
        _out.print(f"{made.campaign_id}: {made.num_tasks} tasks, {made.num_answers_wanted} answers wanted")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected a JSON object")
                yield number, row
    except (OSError, ValueError) as error:
        raise FeedbackError(f"{path} cannot be read as JSON lines: {error}") from None


def _record(kind: type[Any], row: Mapping[str, Any], path: Path, line: int) -> Any:
    try:
        return kind(**row)
    except TypeError as error:
        raise FeedbackError(f"{path}, line {line}: {str(error).partition('.__init__() ')[2]}") from None


@campaign_app.command("list")
def list_campaigns(url: UrlOption) -> None:
    """All campaigns, and how far they are."""
    from accord.feedback import Campaigns

    with _errors(), Campaigns(url) as campaigns:
        table = _table("campaign", "kind", "title", "each", "answers", "wanted")
        for row in campaigns.campaigns():
            numbers = (row.judgements_per_item, row.num_answers, row.num_answers_wanted)
            table.add_row(_plain(row.campaign_id), row.kind, _plain(row.title), *map(str, numbers))
        _out.print(table)


@app.command()
def status(
    campaign: CampaignArgument,
    url: UrlOption,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How a campaign stands: progress, good-rates, agreement, and what is stuck."""
    from accord.feedback import Campaigns

    with _errors(), Campaigns(url) as campaigns:
        progress = campaigns.progress(campaign)
    if as_json:
        import dataclasses

        typer.echo(json.dumps(dataclasses.asdict(progress), default=str, ensure_ascii=False, indent=2))
        return
    _out.print(f"[bold]{_plain(progress.campaign.title)}[/]")
    _out.print(
        f"{progress.answers} of {progress.wanted} answers by {progress.raters} raters; "
        f"{progress.tasks_done} of {progress.tasks} tasks done, {progress.gold_tasks} gold; "
        f"{progress.leased} leased, {progress.expired} leases ran out"
    )
    _out.print(_shares(progress))
    for question, counts in progress.preferences.items():
        _out.print(f"{question}: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    for task in progress.stuck:
        _out.print(
            f"[yellow]stuck:[/] {task.task_id} ({task.expiries} leases ran out): {_plain(task.prompt)}"
        )


def _shares(progress: "Progress") -> Table:
    table = _table("category", "images", "judgements", "good", "bad", "skip", "alpha", "kappa")
    for name in list(dict.fromkeys([*progress.shares, *progress.agreement])):
        shares, agreement = progress.shares.get(name), progress.agreement.get(name)
        cells = ["", "", "", "", ""]
        if shares is not None:
            numbers = [f"{shares[key]:.0f}" for key in ("candidates", "judgements")]
            cells = [*numbers, *(f"{shares[key]:.1%}" for key in ("good", "bad", "skip"))]
        table.add_row(
            _plain(name),
            *cells,
            _number(agreement.alpha if agreement else None),
            _number(agreement.kappa if agreement else None),
        )
    return table


@app.command()
def raters(campaign: CampaignArgument, url: UrlOption) -> None:
    """How each rater of a campaign does; suspected ones are marked."""
    from accord.feedback import Campaigns

    with _errors(), Campaigns(url) as campaigns:
        table = _table("rater", "answers", "median s", "agreement", "gold", "reliability", "")
        for row in campaigns.raters(campaign):
            note = f"excluded: {_plain(row.reason)}" if row.excluded else "suspected" if row.suspected else ""
            gold = "" if row.gold_accuracy is None else f"{row.gold_accuracy:.2f} of {row.gold_judged}"
            table.add_row(
                _plain(row.rater),
                str(row.answers),
                "" if row.median_s is None else f"{row.median_s:.1f}",
                _number(row.agreement),
                gold,
                _number(row.reliability),
                note,
            )
        _out.print(table)


@app.command()
def exclude(
    rater: Annotated[str, typer.Argument(help="Whose judgements no longer count.")],
    url: UrlOption,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
) -> None:
    """Exclude or withdraw a rater: nothing that he said counts from now on."""
    from accord.feedback import Campaigns

    with _errors(), Campaigns(url) as campaigns:
        freed = campaigns.exclude(rater, reason)
    _out.print(
        f"{_plain(rater)} is excluded; {freed} places are free for others. What used his judgements before: "
        f"accord feedback affected {_plain(rater)} --runs DIR"
    )


@app.command()
def include(
    rater: Annotated[str, typer.Argument(help="Whose judgements count again.")],
    url: UrlOption,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
) -> None:
    """End an exclusion: what the rater said counts again, where nobody else took his place meanwhile."""
    from accord.feedback import Campaigns

    with _errors(), Campaigns(url) as campaigns:
        places = campaigns.include(rater, reason)
    if places is None:
        _out.print(f"{_plain(rater)} was not excluded")
    else:
        _out.print(f"{_plain(rater)} rates again; {places} answers in campaigns count again")


@app.command()
def affected(
    rater: Annotated[str, typer.Argument(help="Whose judgements are followed.")],
    runs: Annotated[Path, typer.Option(help="The directory of runs and models to look through.")],
) -> None:
    """List every snapshot, reward, model and report that a rater's judgements went into."""
    from accord.feedback.lineage import affected_by

    with _errors():
        found = affected_by(rater, runs)
    for item in found.affected:
        _out.print(f"{item.kind}\t{_plain(str(item.path))}\t{item.digest[:12]}\t{_plain(item.because)}")
    for path, reason in found.unknown:
        _out.print(f"[yellow]cannot tell:[/] {_plain(str(path))}: {_plain(reason)}")
    if not found.affected:
        _out.print(f"nothing under {_plain(str(runs))} is known to use judgements of {_plain(rater)}")


@app.command()
def snapshot(
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
    url: UrlOption,
    aggregation: Annotated[str, typer.Option(help="majority or weighted.")] = "majority",
    overwrite: OverwriteOption = False,
) -> None:
    """Write an immutable, digested snapshot of what counts now."""
    from accord.feedback import FeedbackStore
    from accord.feedback.snapshot import SNAPSHOT_KIND, write_snapshot

    with _errors(), FeedbackStore(url) as store:
        refuse_to_replace(directory, SNAPSHOT_KIND, overwrite)
        manifest = write_snapshot(store, directory, inputs={}, seed=0, aggregation=aggregation)
    _out.print(f"{manifest.digest} {_plain(str(directory))}")


@app.command("export")
def export_command(
    path: Annotated[Path, typer.Argument(help="A .parquet, .jsonl or .csv file, or a folder.")],
    url: UrlOption,
    kind: FormatOption = None,
    images: ImagesOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write all judgements that count; a folder is one for Hugging Face datasets, with the images."""
    from accord.feedback import FeedbackStore
    from accord.feedback.exchange import export_judgements
    from accord.images import ImageFolder

    with _errors(), FeedbackStore(url) as store:
        if not path.is_dir():  # a folder that holds anything is refused, whatever is said
            refuse_to_overwrite([path], overwrite)
        folder = None if images is None else ImageFolder(images)
        number = export_judgements(store, path, kind=kind, images=folder)
    _out.print(f"{number} judgements in {_plain(str(path))}")


@app.command("import")
def import_command(
    path: Annotated[
        Path, typer.Argument(help="What `accord feedback export` writes, or any file of columns.")
    ],
    url: UrlOption,
    kind: FormatOption = None,
    images: ImagesOption = None,
    column: Annotated[
        list[str],
        typer.Option(
            "--column", help="Which column holds what, as WHAT=COLUMN: prompt=caption, verdict=label."
        ),
    ] = [],  # noqa: B006
    columns: Annotated[
        Path | None, typer.Option("--columns", help="The same in a YAML file.", dir_okay=False)
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="What paths of images are relative to; by default the file's folder.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(callback=within(8), help="Crop and scale images to a square of so many pixels."),
    ] = None,
    campaign: Annotated[str | None, typer.Option(help="Id of the campaign of imported comparisons.")] = None,
) -> None:
    """Store judgements of a file; rows that cannot be stored are told, and the status is then 1.

    With columns stated (docs/feedback.md), preferences and ranks become a campaign of comparisons.
    """
    from accord.cli.public_feedback import import_public, read_columns
    from accord.feedback import FeedbackStore
    from accord.feedback.exchange import import_judgements
    from accord.images import ImageFolder

    found = ""
    with _errors():
        if column or columns is not None:
            stated = read_columns(columns, column)
            report, found = import_public(
                url,
                path,
                stated,
                kind=kind,
                images=images,
                image_root=image_root,
                size_px=size,
                campaign=campaign,
            )
        else:
            with FeedbackStore(url) as store:
                folder = None if images is None else ImageFolder(images)
                report = import_judgements(store, path, kind=kind, images=folder)
    for item in report.rejected:
        typer.echo(f"{path}:{item.line}: {item.reason}", err=True)
    what = "comparisons" if found else "judgements"
    _out.print(
        f"{report.new_judgements} new {what}, {report.known_judgements} known before, "
        f"{len(report.rejected)} rows refused; "
        + (f"campaign {_plain(found)}" if found else f"{report.new_candidates} new images")
    )
    if report.rejected:
        raise typer.Exit(_BAD_ROWS)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(text: str) -> str:
    """Text of others: no markup of ours, and no control characters for the terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in text))
