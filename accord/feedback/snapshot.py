"""Feedback snapshots: immutable, digested tables of what was judged, one row a candidate; and, so that a
rater can be followed to what used his judgements, every judgement, rater, and answer to a comparison.

A snapshot holds no times and no order of arrival: the same judgements give the same bytes, and so the same
digest.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from accord.artifacts import Manifest, artifact_writer, read_manifest, verify
from accord.errors import FeedbackError
from accord.feedback.aggregate import Labels, VoteCount, find_aggregation, shares_by_category
from accord.feedback.comparisons import Compared
from accord.feedback.quality import krippendorff_alpha
from accord.feedback.store import FeedbackStore, Judged
from accord.feedback.tables import VERDICTS
from accord.tables import read_table

SNAPSHOT_KIND = "feedback_snapshot"
SNAPSHOT_NAME = "snapshot.parquet"
JUDGEMENTS_NAME = "judgements.parquet"
RATERS_NAME = "raters.parquet"
COMPARISONS_NAME = "comparisons.parquet"  # there only if something was compared

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
        # 0 without a label; else 1, or how sure a weighted label is
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
_JUDGEMENTS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("image", "prompt", "rater", "verdict")]
)
_RATERS_SCHEMA = pa.schema(
    [
        pa.field("rater", pa.string(), nullable=False),
        pa.field("judgements", pa.int64(), nullable=False),
        pa.field("reliability", pa.float64()),  # where the aggregation estimates it
    ]
)

_DIGESTS = pa.list_(pa.field("element", pa.string()))  # the name that Parquet gives it
_COMPARISONS_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("first", _DIGESTS, nullable=False),
        pa.field("second", _DIGESTS, nullable=False),
        pa.field("rater", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
    ]
)

Key = tuple[str, str]  # image and prompt


def write_snapshot(
    store: FeedbackStore,
    directory: str | Path,
    *,
    inputs: Mapping[str, str],
    seed: int,
    aggregation: str = "majority",
    only: Collection[Key] | None = None,
    campaigns: Collection[str] = (),
) -> Manifest:
    """Write what was judged and compared until now as an artifact; not candidates that nobody judged.

    Args:
        only: the (image, prompt) that it is about; a store may hold those of other runs too. Without it, all.
        campaigns: ids of comparison campaigns whose answers are in it too, whatever images they are of.
        inputs: digests of the artifacts that the candidates are from, by name.
        seed: the run's; it only goes into the manifest.
        aggregation: how votes become a label; see `accord.feedback.aggregate`.

    Raises:
        FeedbackError: nothing was judged yet, or the aggregation is unknown. Nothing is written then.
        StorageError: the disk is full.
    """
    aggregate = find_aggregation(aggregation)
    judged = store.judged()
    if only is not None:
        judged = {key: item for key, item in judged.items() if key in only}
    compared = store.compared(campaigns, only)
    if not judged and not compared:
        raise FeedbackError(
            f"{store} holds no judgements, so there is nothing to take a snapshot of; let raters judge first"
        )
    known: dict[Hashable, bool] = dict(store.gold().items())
    labels = aggregate({key: item.votes for key, item in judged.items()}, known)
    config = {"aggregation": aggregation}
    with artifact_writer(directory, SNAPSHOT_KIND, inputs=inputs, config=config, seed=seed) as temporary:
        _write(temporary / SNAPSHOT_NAME, _SCHEMA, _candidate_rows(judged, labels))
        _write(temporary / JUDGEMENTS_NAME, _JUDGEMENTS_SCHEMA, _judgement_rows(judged))
        _write(temporary / RATERS_NAME, _RATERS_SCHEMA, _rater_rows(judged, labels))
        if compared:
            rows = (dataclasses.astuple(item) for item in compared)
            _write(temporary / COMPARISONS_NAME, _COMPARISONS_SCHEMA, rows)
    return read_manifest(directory)


def _candidate_rows(judged: Mapping[Key, Judged], labels: Labels) -> Iterator[tuple[object, ...]]:
    for (image, prompt), item in judged.items():
        given = Counter(verdict for _, verdict in item.votes)
        key = (image, prompt)
        numbers = (given[verdict] for verdict in VERDICTS)
        yield image, prompt, item.category, item.split, *numbers, labels.label[key], labels.weight[key]


def _judgement_rows(judged: Mapping[Key, Judged]) -> Iterator[tuple[object, ...]]:
    for key, item in judged.items():
        for vote in item.votes:
            yield *key, *vote


def _rater_rows(judged: Mapping[Key, Judged], labels: Labels) -> Iterator[tuple[object, ...]]:
    given = Counter(rater for item in judged.values() for rater, _ in item.votes)
    for rater, number in sorted(given.items()):
        yield rater, number, labels.reliability.get(rater)


def _write(path: Path, schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> None:
    columns: list[list[object]] = [[] for _ in schema.names]
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    # The same settings, whatever a later pyarrow's defaults are: the bytes are the digest.
    pq.write_table(
        pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema),
        path,
        version="2.6",
        compression="zstd",
        compression_level=3,
        row_group_size=1 << 16,
    )


def load_snapshot(directory: str | Path) -> pd.DataFrame:
    """A snapshot as a table, one row a judged candidate, by image and prompt.

    Its columns: image, prompt, category, split; good, bad and skip (numbers of votes); label (1 good, 0 bad,
    NaN when the votes do not decide); weight (0 without a label; else 1, or how sure a weighted label is).

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


def load_snapshot_judgements(directory: str | Path) -> pd.DataFrame:
    """The judgements of a snapshot, by image, prompt and rater: columns image, prompt, rater, verdict.

    Raises:
        ArtifactError: it is missing, was changed, is something else, or was made before judgements were kept.
    """
    verify(directory, SNAPSHOT_KIND)
    frame: pd.DataFrame = read_table(Path(directory) / JUDGEMENTS_NAME, _JUDGEMENTS_SCHEMA).to_pandas()
    return frame


def load_snapshot_comparisons(directory: str | Path) -> list[Compared]:
    """The answers to comparisons in a snapshot, in order; empty where there are none.

    Raises:
        ArtifactError: it is missing, was changed, or is something else.
    """
    if COMPARISONS_NAME not in verify(directory, SNAPSHOT_KIND).files:
        return []
    rows = read_table(Path(directory) / COMPARISONS_NAME, _COMPARISONS_SCHEMA).to_pylist()
    return [Compared(**{**row, "first": tuple(row["first"]), "second": tuple(row["second"])}) for row in rows]


def load_snapshot_raters(directory: str | Path) -> pd.DataFrame:
    """The raters of a snapshot by name: columns rater, judgements, reliability (NaN where not estimated).

    Raises:
        ArtifactError: as `load_snapshot_judgements`.
    """
    verify(directory, SNAPSHOT_KIND)
    frame: pd.DataFrame = read_table(Path(directory) / RATERS_NAME, _RATERS_SCHEMA).to_pandas()
    return frame


def snapshot_raters(directory: str | Path) -> dict[str, Any]:
    """Who judged, and how much they agree; empty for a snapshot of a version that did not keep judgements.

    `count` raters; `alpha`, Krippendorff's, over the `items` images that two or more did not skip (None where
    nobody can be compared); and `by_rater`: `judgements`, and shares of `good`, `bad` and `skip`.

    Raises:
        ArtifactError: as `load_snapshot`.
    """
    if not (Path(directory) / JUDGEMENTS_NAME).exists():
        return {}
    said: dict[tuple[str, str], dict[str, str]] = {}
    given: dict[str, Counter[str]] = {}
    for image, prompt, rater, verdict in load_snapshot_judgements(directory).itertuples(index=False):
        given.setdefault(rater, Counter())[verdict] += 1
        if verdict != "skip":
            said.setdefault((image, prompt), {})[rater] = verdict
    return {
        "count": len(given),
        "items": sum(len(votes) > 1 for votes in said.values()),
        "alpha": krippendorff_alpha(list(said.values())),
        "by_rater": {
            rater: {
                "judgements": counts.total(),
                **{verdict: counts[verdict] / counts.total() for verdict in VERDICTS},
            }
            for rater, counts in sorted(given.items())
        },
    }
