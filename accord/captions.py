"""Images with captions: what a model is pre-trained on, and the real images that it is compared with.

A *source* is a function that a recipe names as "module:function", called as
`source(count, seed, **options) -> Iterator[CaptionedImage]`. The same arguments give the same images in the
same order. Two ship here, `image_folder` and `parquet`; another is `accord.webdataset:shards`. Bring your own
by writing such a function. What a source gave is kept by captioned.py.

Legend: H height and W width in pixels, C the three channels red, green, blue.
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from accord.config import load_object, resolve_path
from accord.errors import ConfigError, ImageError
from accord.images import Pixels, decode_image, resize_and_crop

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_METADATA_NAME = "metadata.jsonl"
_CAPTION_COLUMNS = ("caption", "text")


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image (uint8 RGB, HWC) and the text that describes it."""

    image: Pixels
    caption: str


def open_source(
    spec: str, count: int, seed: int, options: Mapping[str, Any] | None = None
) -> Iterator[CaptionedImage]:
    """`count` captioned images of the source that `spec` ("module:function") names.

    Raises:
        ConfigError: there is no such function, or it does not know an option; and whatever the source raises.
    """
    source = load_object(spec)
    try:
        signature = inspect.signature(source)
        signature.bind(count, seed, **(options or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{spec!r} cannot be called as source(count, seed, ...) with the options "
            f"{', '.join(options or {}) or '(none)'}: {error}"
        ) from None
    images: Iterator[CaptionedImage] = source(count, seed, **(options or {}))
    return images


def image_folder(
    count: int, seed: int, *, path: str, size: int | None = None, caption_key: str = "text"
) -> Iterator[CaptionedImage]:
    """`count` images of a folder (PNG, JPEG, WebP; subfolders too), in an order that `seed` shuffles.

    The captions are in `metadata.jsonl`, one {"file_name": ..., "text": ...} a line, as in the image folders
    of Hugging Face's datasets; or, without such a file, in NAME.txt beside NAME.png.

    Args:
        count: how many images, without repetition.
        seed: of the order.
        path: the folder.
        size: side in pixels; the shorter side is resized to it, and the middle is cut out. None: as they are.
        caption_key: the key of the caption in metadata.jsonl.

    Raises:
        ConfigError: at once, when the folder, a line of its metadata, a caption or `count` is wrong.
        ImageError: on the way, naming the file that is no image.
    """
    folder = resolve_path(path)
    check_request(count, size)
    if not folder.is_dir():
        raise ConfigError(f"there is no image folder {folder}")
    from_metadata = (folder / _METADATA_NAME).is_file()
    entries = _from_metadata(folder, caption_key) if from_metadata else _from_text_files(folder)
    check_count(count, len(entries), str(folder))
    order = np.random.default_rng(seed).permutation(len(entries))[:count]
    return (_load(entries[index], size) for index in order)


def parquet(
    count: int,
    seed: int,
    *,
    path: str,
    size: int | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
) -> Iterator[CaptionedImage]:
    """`count` rows of a Parquet file, or of all *.parquet in a folder, chosen and shuffled by `seed`.

    One row group is in memory at a time: the rows are chosen from all files alike, row groups come in a
    shuffled order, and rows are shuffled within their group.

    Args:
        count: how many rows, without repetition.
        seed: of the choice and the order.
        path: a file or a folder.
        size: side in pixels; the shorter side is resized to it, and the middle is cut out. None: as they are.
        image_column: a column of encoded images: bytes, or a struct with `bytes` (Hugging Face's way).
        caption_column: the column of captions; None: "caption", or else "text".

    Raises:
        ConfigError: at once, when the path, a column or `count` is wrong; on the way, when a caption is
            missing.
        ImageError: on the way, naming the file and row (from 0) that is no image.
    """
    root = resolve_path(path)
    check_request(count, size)
    groups = [
        group
        for file in files_of(root, ".parquet", "Parquet file")
        for group in _row_groups(file, _parquet_columns(file, image_column, caption_column))
    ]
    check_count(count, sum(group.rows for group in groups), str(root))
    return _rows_of(groups, count, seed, size)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An image file, its caption, and where that stands, for errors."""

    path: Path
    caption: str
    where: str


@dataclasses.dataclass(frozen=True)
class _RowGroup:
    """A row group of a Parquet file; `first` is the number of its first row in the file."""

    file: Path
    columns: tuple[str, str]  # of the images and of the captions
    index: int
    first: int
    rows: int


def _from_metadata(folder: Path, caption_key: str) -> list[_Entry]:
    path = folder / _METADATA_NAME
    entries = []
    # Not splitlines: a caption may hold one of the rarer line separators.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a {type(row).__name__}; expected an object with 'file_name'")
        for key in ("file_name", caption_key):
            if key not in row:
                raise ConfigError(f"{where}: there is no {key!r}; the keys are {', '.join(map(repr, row))}")
        entries.append(
            _Entry(_inside(folder, row["file_name"], where), check_caption(row[caption_key], where), where)
        )
    return entries


def _from_text_files(folder: Path) -> list[_Entry]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    without = [path for path in images if not path.with_suffix(".txt").is_file()]
    if without:
        raise ConfigError(
            f"{len(without)} of {len(images)} images in {folder} have no caption, the first is {without[0]}; "
            f"expected {without[0].with_suffix('.txt').name} beside it, or {_METADATA_NAME} in {folder}"
        )
    entries = []
    for image in images:
        path = image.with_suffix(".txt")
        entries.append(_Entry(image, check_caption(_read_text(path).strip(), str(path)), str(path)))
    return entries


def _inside(folder: Path, name: object, where: str) -> Path:
    if (
        not isinstance(name, str)
        or not name
        or not (folder / name).resolve().is_relative_to(folder.resolve())
    ):
        raise ConfigError(f"{where}: file_name is {name!r}; expected a path inside {folder}")
    if not (folder / name).is_file():
        raise ConfigError(f"{where}: there is no file {folder / name}")
    return folder / name


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _load(entry: _Entry, size: int | None) -> CaptionedImage:
    try:
        data = entry.path.read_bytes()
    except OSError as error:
        raise ImageError(f"{entry.where}: cannot read {entry.path}: {error.strerror}") from None
    return CaptionedImage(decode_to(data, f"{entry.path} ({entry.where})", size), entry.caption)


def _parquet_columns(file: Path, image_column: str, caption_column: str | None) -> tuple[str, str]:
    """The names of the columns of images and of captions, which are there and of a type that we can read."""
    schema = _open_parquet(file).schema_arrow
    wanted = (caption_column,) if caption_column else _CAPTION_COLUMNS
    caption_column = next((name for name in wanted if name in schema.names), None)
    if image_column not in schema.names or caption_column is None:
        raise ConfigError(
            f"{file} has the columns {', '.join(schema.names)}; expected images in {image_column!r} and "
            f"captions in {' or '.join(map(repr, wanted))} (options image_column and caption_column)"
        )
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(
            f"{file}: the column {image_column!r} is of the type {kind}; expected the bytes of image files, "
            "or a struct with a field 'bytes'"
        )
    return image_column, caption_column


def _row_groups(file: Path, columns: tuple[str, str]) -> Iterator[_RowGroup]:
    metadata = _open_parquet(file).metadata
    first = 0
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        yield _RowGroup(file, columns, index, first, rows)
        first += rows


def _rows_of(groups: list[_RowGroup], count: int, seed: int, size: int | None) -> Iterator[CaptionedImage]:
    for number, rows in chosen_of([group.rows for group in groups], count, seed):
        yield from _read_rows(groups[number], rows, size)


def _read_rows(group: _RowGroup, rows: list[int], size: int | None) -> Iterator[CaptionedImage]:
    image_column, caption_column = group.columns
    table = _open_parquet(group.file).read_row_group(group.index, columns=list(group.columns)).take(rows)
    for row, image, caption in zip(rows, table[image_column], table[caption_column], strict=True):
        where = f"{group.file}, row {group.first + row}"
        data = image.as_py()
        if isinstance(data, dict):
            data = data["bytes"]
        if data is None:
            raise ImageError(f"{where}: there are no image bytes in {image_column!r}")
        text = check_caption(caption.as_py(), where)
        yield CaptionedImage(decode_to(data, where, size), text)


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file} is no Parquet file: {error}") from None


def decode_to(data: bytes, where: str, size: int | None) -> Pixels:
    try:
        image_HWC = decode_image(data)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    return image_HWC if size is None else resize_and_crop(image_HWC, size)


def files_of(root: Path, suffix: str, kind: str) -> list[Path]:
    """The file itself, or all below a folder that end in `suffix`, in the order of their names."""
    if root.is_file():
        return [root]
    files = sorted(root.rglob(f"*{suffix}"))
    if not files:
        raise ConfigError(f"{root} is no {kind}, and no folder that has one (*{suffix})")
    return files


def chosen_of(counts: list[int], count: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """`count` of all that the parts hold (`counts`), chosen and shuffled by `seed`: the part, and what of it.

    A part comes once, and not when nothing of it is chosen.
    """
    generator = np.random.default_rng(seed)
    ends = np.cumsum(counts)
    chosen = generator.permutation(ends[-1])[:count]
    part_of_chosen = np.searchsorted(ends, chosen, side="right")
    for part in generator.permutation(len(counts)):
        places = chosen[part_of_chosen == part] - (ends[part] - counts[part])
        if len(places):
            yield int(part), places.tolist()


def check_request(count: int, size: int | None) -> None:
    if count < 1:
        raise ConfigError(f"count is {count}; expected at least 1 image")
    if size is not None and size < 1:
        raise ConfigError(f"size is {size}; expected a number of pixels, or none to keep each image's size")


def check_count(count: int, found: int, where: str) -> None:
    if found < count:
        raise ConfigError(
            f"{count} images are asked of {where}, which has {found}; lower count or add images"
        )


def check_caption(caption: object, where: str) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise ConfigError(f"{where}: the caption is {caption!r}; expected text")
    return caption
