"""Rows of Parquet, JSON lines, JSON arrays and CSV, with the line that each is from: what cannot be
read is told by its reason, and the rest is read.
"""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from accord.errors import FeedbackError

FORMATS = ("parquet", "jsonl", "csv", "json")

_PARQUET_ROWS = 64  # at a time: rows may hold images

Row = Mapping[str, Any]


def read_rows(
    path: Path, kind: str, *, required: Collection[str] = (), only: Collection[str] | None = None
) -> Iterator[tuple[int, Row | str]]:
    """Each row with its number, or why it cannot be read. Lines of text, and rows of Parquet
    and of a JSON array, count from 1.

    Args:
        kind: one of `FORMATS`.
        required: columns that a CSV or Parquet file must have; in JSON lines each row has its own.
        only: columns that are read of Parquet; without it, all.

    Raises:
        FeedbackError: the file as a whole cannot be read, or lacks a column.
    """
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, required, only)
        elif kind == "jsonl":
            yield from json_rows(path)
        elif kind == "json":
            yield from _array_rows(path)
        else:
            yield from _csv_rows(path, required)
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise FeedbackError(f"{path} cannot be read as {kind}: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Raises OSError when the file cannot be read."""
    for line, data in enumerate(path.read_bytes().splitlines(), start=1):
        if not data.strip():
            continue
        try:
            row = json.loads(data)
        except ValueError as error:
            yield line, f"no JSON: {error}"
            continue
        yield line, row if isinstance(row, dict) else "no JSON object"


def _array_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise FeedbackError(f"{path} cannot be read as json: {error}") from None
    if not isinstance(rows, list):
        raise FeedbackError(f"{path} holds no array of rows; JSON lines are named .jsonl")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else "no JSON object"


def _parquet_rows(
    path: Path, required: Collection[str], only: Collection[str] | None
) -> Iterator[tuple[int, Row | str]]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _check_columns(path, required, names)
        columns = None if only is None else [name for name in names if name in only]
        line = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                line += 1
                yield line, row


def _csv_rows(path: Path, required: Collection[str]) -> Iterator[tuple[int, Row | str]]:
    # Bytes that are no UTF-8 become lone surrogates, which the store's checks refuse row by row.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    _check_columns(path, required, reader.fieldnames or ())
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"no CSV: {error}"
            continue
        if row is None:
            return
        if "" in row or None in row.values():
            yield reader.line_num, f"expected {len(reader.fieldnames or ())} fields"
        else:
            yield reader.line_num, {name: value for name, value in row.items() if value != ""}


def _check_columns(path: Path, required: Collection[str], names: Collection[str]) -> None:
    lacking = [name for name in required if name not in names]
    if lacking:
        raise FeedbackError(
            f"{path} lacks the column(s) {', '.join(lacking)}; it has {', '.join(names) or 'none'}"
        )
