"""`accord generate`, `accord score` and `accord replay`: the client's calls from a terminal."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from accord.cli.common import OverwriteOption, errors_shown, refuse_to_overwrite, stderr, within
from accord.cli.connection import (
    CaFileOption,
    CertificateOption,
    EndpointOption,
    KeyOption,
    TimeoutOption,
    TokenFileOption,
    connect,
)
from accord.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from accord.client import Client, GeneratedImage, Generation

SHEET_NAME = "contact-sheet.png"
MANIFEST_NAME = "manifest.json"
_PANEL = "How it is drawn"


def generate(
    prompt: Annotated[str, typer.Argument(help="What the images should show.")],
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="Images to keep: 1 to 64.", callback=within(1, 64))
    ] = 1,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Images to draw, of which the best are kept: up to 256; by default as many.",
            callback=within(1, 256),
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for images, contact sheet and manifest.")
    ] = Path("out"),
    overwrite: OverwriteOption = False,
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same images.", callback=within(0, 2**64 - 1))
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps: 1 to 150.", callback=within(1, 150), rich_help_panel=_PANEL),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance: 0 to 30.", callback=within(0, 30), rich_help_panel=_PANEL
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What they should not show.", rich_help_panel=_PANEL)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="In pixels.", callback=within(1), rich_help_panel=_PANEL)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="In pixels.", callback=within(1), rich_help_panel=_PANEL)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim, dpm_solver_multistep, euler or unipc.", rich_help_panel=_PANEL),
    ] = None,
    image_format: Annotated[
        str, typer.Option("--format", help="png, jpeg or webp.", rich_help_panel=_PANEL)
    ] = "png",
    model: Annotated[
        str | None, typer.Option(help="Alias or digest of a diffusion model.", rich_help_panel=_PANEL)
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Alias or digest of a reward model.", rich_help_panel=_PANEL)
    ] = None,
    accept_reward: Annotated[
        float | None,
        typer.Option(
            help="Stop when enough images have this reward: 0 to 1.",
            callback=within(0, 1),
            rich_help_panel=_PANEL,
        ),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the best so far is enough: 0.01 to 3600.",
            callback=within(0.01, 3600),
            rich_help_panel=_PANEL,
        ),
    ] = None,
    endpoint: EndpointOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Draw images for a prompt, and keep those with the highest reward.

    Writes the images (01.png is the best), a contact sheet of all candidates, and a manifest from which
    `accord replay` makes any of them again. What is there already is only replaced with --overwrite.
    """
    options: dict[str, Any] = {
        "num_images": num_images,
        "candidates": candidates,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "scheduler": scheduler,
        "image_format": image_format,
        "model": model,
        "reward_model": reward_model,
        "accept_reward": accept_reward,
        "time_budget_s": time_budget,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with errors_shown():
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; expected a folder for the images (-o FOLDER)")
        numbers = range(1, num_images + 1)
        images = [out / f"{number:02d}{suffix}" for number in numbers for suffix in (".png", ".jpg", ".webp")]
        refuse_to_overwrite([*images, out / SHEET_NAME, out / MANIFEST_NAME], overwrite)
        before = _described_in(out)
        with connect(endpoint, token_file, ca_file, certificate, key) as client, _options_named():
            made, drawn = _drawn(client, prompt, timeout, given)
        files = _write(made, drawn, prompt, out)
        for path in {*images, *before}.difference(files):  # of the generation that was there before
            path.unlink(missing_ok=True)
    _print_generation(made, files, out)


def score(
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files.")],
    prompt: Annotated[
        list[str],
        typer.Option(
            help="What they should show; several are all tried. Without it, what a PNG says itself."
        ),
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    reward_model: Annotated[str, typer.Option(help="Alias or digest of a reward model.")] = "",
    endpoint: EndpointOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Score images by the reward model of a running gateway. (With --recipe: the stage of a run.)"""
    with errors_shown():
        data = {path: _read(path) for path in images}
        pairs = [(path, text) for path in images for text in (prompt or [_own_prompt(path, data[path])])]
        with connect(endpoint, token_file, ca_file, certificate, key) as client:
            scores = client.score(
                [(data[path], text) for path, text in pairs], reward_model=reward_model, timeout_s=timeout
            )
    table = Table("Image", "Prompt", box=None, pad_edge=False)
    for name in ("Reward", "CLIP", "P(prompt)"):
        table.add_column(name, justify="right")
    for (path, text), found in sorted(
        zip(pairs, scores, strict=True), key=lambda both: both[1].reward, reverse=True
    ):
        probability = "-" if found.prompt_probability is None else f"{found.prompt_probability:.3f}"
        table.add_row(str(path), text, f"{found.reward:.3f}", f"{found.clip_similarity:.3f}", probability)
    Console(highlight=False, markup=False).print(table)


def replay(
    source: Annotated[Path, typer.Argument(help="A PNG from Accord, or a manifest as JSON.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The image's file; its suffix says the format.")],
    rank: Annotated[
        int, typer.Option(help="Which image of a manifest that `accord generate` wrote.", callback=within(1))
    ] = 1,
    overwrite: OverwriteOption = False,
    endpoint: EndpointOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Make an image again from its manifest. The same model must be loaded."""
    formats: dict[str, Any] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    with errors_shown():
        if out.suffix.lower() not in formats:
            raise ConfigError(f"{out}: expected a file that ends in {', '.join(formats)}")
        refuse_to_overwrite([out], overwrite)
        manifest = _manifest(source, rank)
        with connect(endpoint, token_file, ca_file, certificate, key) as client:
            image = client.replay(manifest, image_format=formats[out.suffix.lower()], timeout_s=timeout)
        image.save(out)
    stderr().print(f"{out}: reward {image.reward:.3f}", markup=False)


@contextlib.contextmanager
def _options_named() -> Iterator[None]:
    """What the server finds wrong is told of the options, not of the fields of its contract."""
    from accord.client.errors import InvalidRequest

    names = {"prompt": "the prompt", "num_candidates": "--candidates", "image_format": "--format"}
    try:
        yield
    except InvalidRequest as error:
        if not error.violations:
            raise
        lines = []
        for violation in error.violations:
            field = violation.field.removeprefix("spec.")
            option = names.get(field, f"--{field.replace('_', '-')}")
            lines.append(f"{option}: {violation.description.replace('num_images (', '--num-images (')}")
        raise ConfigError("the server takes no such request; " + "\n  ".join(lines)) from None


def _drawn(
    client: "Client", prompt: str, timeout_s: float, options: dict[str, Any]
) -> "tuple[Generation, list[GeneratedImage]]":
    """The result, and every candidate that was drawn for it."""
    from accord import client as api

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    drawn: dict[str, GeneratedImage] = {}
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("Drawing", total=1.0, note="")
        events = client.stream(prompt, timeout_s=timeout_s, **options)
        with contextlib.closing(events):
            for event in events:
                match event:
                    case api.Progress():
                        note = f"{event.candidates_done} of {event.candidates_total}"
                        progress.update(task, completed=event.fraction, note=note)
                    case api.GeneratedImage():
                        drawn[event.image_id] = event
                    case api.Generation():
                        return event, [*event.images, *_rest(event, drawn)]
    raise AssertionError("a stream ends with a Generation or an error")


def _rest(made: "Generation", drawn: "dict[str, GeneratedImage]") -> "list[GeneratedImage]":
    """The candidates that were not chosen, best first; without those of another model, before a retry."""
    chosen = {image.candidate for image in made.images}
    others = [
        image
        for image in drawn.values()
        if image.candidate not in chosen and image.manifest.model_digest == made.summary.model_digest
    ]
    return sorted(others, key=lambda image: image.reward, reverse=True)


def _write(made: "Generation", drawn: "Sequence[GeneratedImage]", prompt: str, out: Path) -> list[Path]:
    from accord.artifacts import write_file
    from accord.cli.contact_sheet import Cell, contact_sheet
    from accord.client import manifest_json

    files = [image.save(out / f"{image.rank:02d}{image.suffix}") for image in made.images]
    cells = [
        Cell(image.pixels(), image.reward, place < len(made.images)) for place, image in enumerate(drawn)
    ]
    summary = made.summary
    about = f"best {len(files)} of {len(drawn)}, seed {summary.seed}, model {summary.model_digest:.12}"
    buffer = io.BytesIO()
    contact_sheet(cells, prompt, about).save(buffer, "PNG")
    write_file(out / SHEET_NAME, buffer.getvalue(), durable=False)
    described = [
        {
            "file": path.name,
            "rank": image.rank,
            "reward": round(image.reward, 6),
            "clip_similarity": round(image.clip_similarity, 6),
            "image_id": image.image_id,
            "manifest": json.loads(manifest_json(image.manifest)),
        }
        for path, image in zip(files, made.images, strict=True)
    ]
    whole = {
        "prompt": prompt,
        "request_id": made.request_id,
        "seed": str(made.summary.seed),  # as protobuf's JSON writes 64 bits
        "finish_reason": made.summary.finish_reason,
        "candidates": made.summary.candidates_done,
        "elapsed_s": made.summary.elapsed_s,
        "model_digest": made.summary.model_digest,
        "reward_model_digest": made.summary.reward_model_digest,
        "images": described,
    }
    write_file(out / MANIFEST_NAME, json.dumps(whole, indent=2, ensure_ascii=False) + "\n", durable=False)
    return files


def _described_in(out: Path) -> list[Path]:
    """The images that the folder's manifest names; none where it has none that can be read."""
    try:
        images = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))["images"]
        names = [str(image["file"]) for image in images]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [out / name for name in names if Path(name).name == name]


def _print_generation(made: "Generation", files: Sequence[Path], out: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("Rank", "Reward", "CLIP"):
        table.add_column(name, justify="right")
    table.add_column("File")
    for image, path in zip(made.images, files, strict=True):
        table.add_row(str(image.rank), f"{image.reward:.3f}", f"{image.clip_similarity:.3f}", str(path))
    Console(highlight=False, markup=False).print(table)
    summary = made.summary
    stderr().print(
        f"Best {len(files)} of {summary.candidates_done} in {summary.elapsed_s:.1f} s "
        f"({summary.finish_reason}), seed {summary.seed}. All of them: {out / SHEET_NAME}",
        markup=False,
    )


def _manifest(source: Path, rank: int) -> Any:
    from accord.client import manifest_from_json, manifest_from_png

    data = _read(source)
    if data.startswith(b"\x89PNG"):
        return manifest_from_png(data)
    text = data.decode("utf-8", "replace")
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{source} is neither a PNG nor JSON; expected an image or a manifest") from None
    if not isinstance(known, dict) or not isinstance(known.get("images"), list):
        return manifest_from_json(text)
    for image in known["images"]:
        if isinstance(image, dict) and image.get("rank") == rank:
            return manifest_from_json(json.dumps(image.get("manifest")))
    raise ArtifactError(f"{source} has no image of rank {rank}; it has {len(known['images'])} images")


def _own_prompt(path: Path, data: bytes) -> str:
    from accord.client import manifest_from_png
    from accord.errors import ImageError

    try:
        return str(manifest_from_png(data).prompt)
    except ImageError:
        raise ConfigError(
            f"{path} does not say for which prompt it was made: give one with --prompt"
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
