"""Judgements out of a store and into one: Parquet, JSON lines, CSV, and a folder for Hugging Face datasets.

A file has one row a judgement; only those that count are written. A Hugging Face folder ("imagefolder") has
one row an image in metadata.jsonl, its judgements in a list, and the images beside it.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from accord.artifacts import sha256_bytes, storage_errors, write_file
from accord.errors import FeedbackError, ImageError
from accord.feedback.rows import Row, json_rows, read_rows
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import Candidate, Judgement, check_candidate, check_judgement, check_text
from accord.images import ImageFolder

FORMATS = ("parquet", "jsonl", "csv", "imagefolder")
METADATA_NAME = "metadata.jsonl"

_BATCH = 500
_CANDIDATE_FIELDS = tuple(field.name for field in dataclasses.fields(Candidate))
_INTEGERS = ("seed", "width", "height")
_COLUMNS = ("idempotency_key", "rater", "verdict", *_CANDIDATE_FIELDS)
_REQUIRED = ("image", "prompt", "rater", "verdict")


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that could not be imported. `line` counts from 1: lines of text, or rows of Parquet."""

    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What became of a file's judgements: new ones, those that were there before, and those refused."""

    new_candidates: int
    new_judgements: int
    known_judgements: int
    rejected: tuple[Rejected, ...]


def format_of(path: str | Path, name: str | None = None) -> str:
    """The format by its name, or else by the path: its suffix, or "imagefolder" without one.

    Raises:
        FeedbackError: it is none of `FORMATS`.
    """
    suffix = Path(path).suffix.removeprefix(".").lower()
    found = name or suffix or "imagefolder"
    if found not in FORMATS:
        raise FeedbackError(f"unknown format {found!r} of {path}; expected {', '.join(FORMATS)}")
    return found


def export_judgements(
    store: FeedbackStore, path: str | Path, *, kind: str | None = None, images: ImageFolder | None = None
) -> int:
    """Writes the judgements that count, by image, prompt and key, and returns how many.

    The same judgements give the same bytes. Times are not in it.

    Args:
        images: where the images are: an imagefolder holds them too.

    Raises:
        FeedbackError: an unknown format, an imagefolder without images, or a folder that is not empty.
        ImageError: an image is missing or damaged.
        StorageError: the disk is full.
    """
    path, kind = Path(path), format_of(path, kind)
    rows = _rows(store)
    if kind == "imagefolder":
        _write_imagefolder(path, rows, images)
    else:
        write_file(path, _WRITERS[kind](rows))
    return len(rows)


def import_judgements(
    store: FeedbackStore, path: str | Path, *, kind: str | None = None, images: ImageFolder | None = None
) -> ImportReport:
    """Stores what a file holds. Rows that cannot be stored are left out and reported; again: nothing is new.

    Needed are image, prompt, rater and verdict; for an image that the store does not know, also width and
    height. Without an idempotency_key it is made of image, prompt and rater.

    Args:
        images: where to put the images of an imagefolder.

    Raises:
        FeedbackError: the file as a whole cannot be read.
        StorageError: the disk is full.
    """
    path, kind = Path(path), format_of(path, kind)
    lines = list(_lines(path, kind, images))
    rejected = [Rejected(line, row) for line, row in lines if isinstance(row, str)]
    known = {(c.image, c.prompt): c for c in store.candidates()}
    good: list[tuple[int, Candidate, Judgement]] = []
    for line, row in lines:
        if isinstance(row, str):
            continue
        try:
            judgement = _judgement(row)
            candidate = _candidate(row, known)
            check_judgement(judgement)
            check_candidate(candidate)
            good.append((line, candidate, judgement))
        except FeedbackError as error:
            rejected.append(Rejected(line, str(error)))
    candidates = judgements = refused = 0
    for start in range(0, len(good), _BATCH):
        added, stored, wrong = store_rows(store, good[start : start + _BATCH])
        candidates, judgements, refused = candidates + added, judgements + stored, refused + len(wrong)
        rejected += wrong
    return ImportReport(
        candidates,
        judgements,
        len(good) - judgements - refused,
        tuple(sorted(rejected, key=lambda item: (item.line, item.reason))),
    )


def _rows(store: FeedbackStore) -> list[dict[str, Any]]:
    by_key = {(c.image, c.prompt): dataclasses.asdict(c) for c in store.candidates()}
    rows = [
        {
            "idempotency_key": row.idempotency_key,
            "rater": row.rater,
            "verdict": row.verdict,
            **by_key[row.image, row.prompt],
        }
        for row in store.judgements()
    ]
    return sorted(rows, key=lambda row: (row["image"], row["prompt"], row["idempotency_key"]))


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    types = {name: pa.int64() if name in _INTEGERS else pa.string() for name in _COLUMNS}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, version="2.6", compression="zstd")
    return buffer.getvalue()


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(
        json.dumps({name: row[name] for name in _COLUMNS}, ensure_ascii=False) + "\n" for row in rows
    )


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _write_imagefolder(path: Path, rows: list[dict[str, Any]], images: ImageFolder | None) -> None:
    if images is None:
        raise FeedbackError("an imagefolder holds the images too; say in which folder they are")
    if path.exists() and any(path.iterdir()):
        raise FeedbackError(f"{path} is not empty; choose another folder")
    grouped: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        item = {"file_name": f"images/{row['image']}.png", "digest": row["image"]}
        item |= {name: row[name] for name in _CANDIDATE_FIELDS if name != "image"}
        given = {name: row[name] for name in ("idempotency_key", "rater", "verdict")}
        grouped.setdefault((row["image"], row["prompt"]), {**item, "judgements": []})["judgements"].append(
            given
        )
    with storage_errors(path):
        (path / "images").mkdir(parents=True, exist_ok=True)
        for image in sorted({image for image, _ in grouped}):
            write_file(path / "images" / f"{image}.png", images.get(image), durable=False)
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in grouped.values()]
        write_file(path / METADATA_NAME, "".join(lines))


_WRITERS: Mapping[str, Callable[[list[dict[str, Any]]], bytes | str]] = {
    "parquet": _parquet,
    "jsonl": _jsonl,
    "csv": _csv,
}


def _lines(path: Path, kind: str, images: ImageFolder | None) -> Iterator[tuple[int, Row | str]]:
    if kind != "imagefolder":
        yield from read_rows(path, kind, required=_REQUIRED if kind == "csv" else ())
        return
    try:
        yield from _imagefolder_lines(path, images)
    except OSError as error:
        raise FeedbackError(f"{path} cannot be read as {kind}: {error}") from None


def _imagefolder_lines(path: Path, images: ImageFolder | None) -> Iterator[tuple[int, Row | str]]:
    for line, row in json_rows(path / METADATA_NAME):
        if isinstance(row, str):
            yield line, row
            continue
        given = row.get("judgements")
        if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
            yield line, "judgements is no list of objects"
            continue
        try:
            _take_image(path, row, images)
        except (FeedbackError, ImageError) as error:
            yield line, str(error)
            continue
        for item in given:
            yield line, {**row, "image": row.get("digest"), **item}


def _take_image(path: Path, row: Row, images: ImageFolder | None) -> None:
    """Checks an image against its digest, and puts it where images are kept."""
    name = row.get("file_name")
    file = path / name if isinstance(name, str) else path
    if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
        raise FeedbackError(f"file_name is {name!r}; expected a file in the folder")
    data = file.read_bytes()
    if sha256_bytes(data) != row.get("digest"):
        raise FeedbackError(f"{name} does not have the digest {row.get('digest')!r}")
    if images is not None:
        images.put(data)


def _candidate(row: Row, known: Mapping[tuple[str, str], Candidate]) -> Candidate:
    found = known.get((row.get("image", ""), row.get("prompt", "")))
    values: dict[str, Any] = {"category": "imported", "split": "seen", "seed": 0, "source": ""}
    if found is not None:
        values = dataclasses.asdict(found)
    given = {name: row[name] for name in _CANDIDATE_FIELDS if row.get(name) is not None}
    values |= {name: _integer(name, value) if name in _INTEGERS else value for name, value in given.items()}
    lacking = [name for name in _CANDIDATE_FIELDS if name not in values]
    if lacking:
        raise FeedbackError(f"lacks {', '.join(lacking)}")
    return Candidate(**values)


def _integer(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        raise FeedbackError(f"{name} is {value!r}; expected an integer") from None


def _judgement(row: Row) -> Judgement:
    lacking = [name for name in _REQUIRED if row.get(name) is None]
    if lacking:
        raise FeedbackError(f"lacks {', '.join(lacking)}")
    for name in _REQUIRED:
        check_text("row", name, row[name])
    image, prompt, rater, verdict = (row[name] for name in _REQUIRED)
    key = row.get("idempotency_key")
    if key is None:
        text = json.dumps([image, prompt, rater], default=str)
        key = f"import {hashlib.sha256(text.encode()).hexdigest()}"
    return Judgement(key, image, prompt, rater, verdict)


def store_rows(
    store: FeedbackStore, rows: list[tuple[int, Candidate, Judgement]]
) -> tuple[int, int, list[Rejected]]:
    """How many candidates and judgements are new, and what was refused, by line. All at once; when that is
    refused, row by row.
    """
    try:
        added = store.add_candidates(candidate for _, candidate, _ in rows)
    except FeedbackError as error:
        return _one_by_one(store, rows, error)
    try:
        return added, store.submit(judgement for _, _, judgement in rows), []
    except FeedbackError as error:
        _, stored, wrong = _one_by_one(store, rows, error)
        return added, stored, wrong


def _one_by_one(
    store: FeedbackStore, rows: list[tuple[int, Candidate, Judgement]], error: FeedbackError
) -> tuple[int, int, list[Rejected]]:
    if len(rows) == 1:
        return 0, 0, [Rejected(rows[0][0], str(error))]
    parts = [store_rows(store, [row]) for row in rows]
    return (
        sum(part[0] for part in parts),
        sum(part[1] for part in parts),
        [rejected for part in parts for rejected in part[2]],
    )
