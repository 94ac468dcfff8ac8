"""`accord feedback import` with stated columns: public files of verdicts, preferences and ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from accord.errors import ConfigError, FeedbackError

if TYPE_CHECKING:
    from accord.feedback.exchange import ImportReport
    from accord.feedback.importing import ImportColumns

_LISTS = ("good", "bad", "skip")


def read_columns(file: Path | None, stated: Sequence[str]) -> "ImportColumns":
    """The columns of a YAML file, and those stated as "prompt=caption" (lists as "good=1,yes").

    Raises:
        ConfigError: what is stated is no such pair, is unknown, or does not go together.
    """
    from accord.config import load_yaml, validate
    from accord.feedback.importing import ImportColumns

    pairs: dict[str, object] = {}
    for text in stated:
        what, separator, name = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--column {text!r}: expected WHAT=COLUMN, such as prompt=caption")
        pairs[what] = tuple(name.split(",")) if what in _LISTS else name
    if file is None:
        return validate(ImportColumns, pairs, "--column")
    from_file = load_yaml(ImportColumns, file).model_dump(exclude_unset=True)
    return validate(ImportColumns, from_file | pairs, str(file))


def import_public(
    url: str,
    path: Path,
    columns: "ImportColumns",
    *,
    kind: str | None,
    images: Path | None,
    image_root: Path | None,
    size_px: int | None,
    campaign: str | None,
) -> tuple["ImportReport", str]:
    """What became of the file's rows, and the campaign of its comparisons ("" without any).

    Raises:
        FeedbackError: no folder for images, or the file as a whole cannot be read.
    """
    from accord.feedback import FeedbackStore
    from accord.feedback.import_images import ImageSource
    from accord.feedback.importing import import_columns
    from accord.images import ImageFolder

    if images is None:
        raise FeedbackError(
            "say with --images in which folder the images are to be kept (RUN/images of a run)"
        )
    source = ImageSource(ImageFolder(images), image_root or path.parent, size_px)
    console = Console(stderr=True, highlight=False)
    with FeedbackStore(url) as store, console.status(f"reading {path.name}") as status:
        return import_columns(
            store,
            path,
            columns,
            source,
            kind=kind,
            campaign=campaign,
            progress=lambda rows: status.update(f"reading {path.name}: {rows} rows"),
        )
