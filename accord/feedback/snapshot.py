"""Feedback snapshots: immutable, digested tables of what was judged, one row a candidate.

A snapshot holds no times and no order of arrival: the same judgements give the same bytes, and so the same
digest.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from accord.artifacts import Manifest, artifact_writer, read_manifest, verify
from accord.errors import FeedbackError
from accord.feedback.aggregate import VoteCount, find_aggregation, shares_by_category
from accord.feedback.store import FeedbackStore
from accord.feedback.tables import VERDICTS
from accord.tables import read_table

SNAPSHOT_KIND = "feedback_snapshot"
SNAPSHOT_NAME = "snapshot.parquet"

_SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("good", pa.int64(), nullable=False),
        pa.field("bad", pa.int64(), nullable=False),
        pa.field("skip", pa.int64(), nullable=False),
        pa.field("label", pa.float64()),  # 1 good, 0 bad, null when the votes do not decide
        pa.field("weight", pa.float64(), nullable=False),  # 1, or 0 without a label
    ]
)


def write_snapshot(
    store: FeedbackStore,
    directory: str | Path,
    *,
    inputs: Mapping[str, str],
    seed: int,
    aggregation: str = "majority",
) -> Manifest:
    """Write what was judged until now as an artifact. Candidates that nobody judged are not in it.

    Args:
        inputs: digests of the artifacts that the candidates are from, by name.
        seed: the run's; it only goes into the manifest.
        aggregation: how votes become a label; see `accord.feedback.aggregate`.

    Raises:
        FeedbackError: nothing was judged yet, or the aggregation is unknown. Nothing is written then.
        StorageError: the disk is full.
    """
    aggregate = find_aggregation(aggregation)
    counts = store.vote_counts()
    if not counts:
        raise FeedbackError(
            f"{store} holds no judgements, so there is nothing to take a snapshot of; let raters judge first"
        )
    columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    for (image, prompt), rows in groupby(counts, key=lambda row: (row.image, row.prompt)):
        votes = list(rows)
        label = aggregate([row.verdict for row in votes for _ in range(row.count)])
        given = {row.verdict: row.count for row in votes}
        values = {
            "image": image,
            "prompt": prompt,
            "category": votes[0].category,
            "split": votes[0].split,
            **{verdict: given.get(verdict, 0) for verdict in VERDICTS},
            "label": label,
            "weight": 0.0 if label is None else 1.0,
        }
        for name, value in values.items():
            columns[name].append(value)
    config = {"aggregation": aggregation}
    with artifact_writer(directory, SNAPSHOT_KIND, inputs=inputs, config=config, seed=seed) as temporary:
        # The same settings, whatever a later pyarrow's defaults are: the bytes are the digest.
        pq.write_table(
            pa.table(columns, schema=_SCHEMA),
            temporary / SNAPSHOT_NAME,
            version="2.6",
            compression="zstd",
            compression_level=3,
            row_group_size=1 << 16,
        )
    return read_manifest(directory)


def load_snapshot(directory: str | Path) -> pd.DataFrame:
    """A snapshot as a table, one row a judged candidate, by image and prompt.

    Its columns: image, prompt, category, split; good, bad and skip (numbers of votes); label (1 good, 0 bad,
    NaN when the votes do not decide); weight (1, or 0 without a label).

    Raises:
        ArtifactError: it is missing, was changed, or is something else.
    """
    verify(directory, SNAPSHOT_KIND)
    table = read_table(Path(directory) / SNAPSHOT_NAME, _SCHEMA)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def snapshot_distribution(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Shares of good, bad and skip by category and in "total", of a loaded snapshot; as the store's."""
    return shares_by_category(
        VoteCount(row["image"], row["prompt"], row["category"], row["split"], verdict, int(row[verdict]))
        for row in frame.to_dict("records")
        for verdict in VERDICTS
        if row[verdict]
    )
