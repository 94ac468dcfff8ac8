"""Reading the Parquet files of artifacts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from accord.errors import ArtifactError


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The table in `path`, of exactly this schema.

    Raises:
        ArtifactError: it is no Parquet file, or has other columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"{path} is no Parquet file: {error}") from None
    if not table.schema.equals(schema):
        raise ArtifactError(f"{path} has the columns {table.schema.names}; expected {schema.names}")
    return table
