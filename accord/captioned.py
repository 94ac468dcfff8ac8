"""Captioned images as an artifact: what a source (captions.py) gave, kept as PNG and caption in one file."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from accord.artifacts import Manifest, artifact_writer, read_manifest, verify
from accord.captions import CaptionedImage, check_caption
from accord.config import Config
from accord.errors import ArtifactError, ConfigError, ImageError
from accord.images import encode_png
from accord.tables import read_table

CAPTIONED_KIND = "captioned_images"
CAPTIONED_NAME = "captioned.parquet"

_SCHEMA = pa.schema(
    [pa.field("image", pa.binary(), nullable=False), pa.field("caption", pa.string(), nullable=False)]
)
_ROWS_PER_GROUP = 256


def write_captioned(
    source: Iterable[CaptionedImage],
    directory: str | Path,
    *,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | Config,
    seed: int,
) -> Manifest:
    """Keep what a source gives, as PNG and caption, in one Parquet file in the order of the source.

    Raises:
        ConfigError: the source gives nothing, or something else than captioned images.
        ImageError: an image that is not uint8 RGB.
        StorageError: the disk is full. On any error, nothing is written.
    """
    with artifact_writer(directory, CAPTIONED_KIND, inputs=inputs, config=config, seed=seed) as temporary:
        written = 0
        rows = iter(_encoded(source))
        # Settings of our own, not a later pyarrow's: the bytes are the digest. (PNG is compressed already.)
        with pq.ParquetWriter(
            temporary / CAPTIONED_NAME, _SCHEMA, version="2.6", compression="none", use_dictionary=False
        ) as writer:
            while batch := list(itertools.islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(batch, schema=_SCHEMA))
                written += len(batch)
        if not written:
            raise ConfigError(f"the source of captioned images for {directory} gave none")
    return read_manifest(directory)


def read_captioned(directory: str | Path) -> tuple[list[bytes], list[str]]:
    """The PNG files and the captions of what `write_captioned` wrote, in its order.

    Raises:
        ArtifactError: it is missing, was changed, or is something else.
    """
    verify(directory, CAPTIONED_KIND)
    table = read_table(Path(directory) / CAPTIONED_NAME, _SCHEMA)
    return table["image"].to_pylist(), table["caption"].to_pylist()


def read_captions(directory: str | Path) -> list[str]:
    """The captions alone of what `write_captioned` wrote, whose images may be more than memory holds.

    Raises:
        ArtifactError: it is missing, was changed, or is something else.
    """
    verify(directory, CAPTIONED_KIND)
    with _open_captioned(directory) as file:
        captions: list[str] = file.read(columns=["caption"])["caption"].to_pylist()
    return captions


def each_png(directory: str | Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The PNG files `start` to `stop` (not included; None: the last too) of what `write_captioned` wrote, of
    which a few hundred are in memory at a time. They are not checked against the manifest.

    Raises:
        ArtifactError: the file is missing, or is something else.
    """
    with _open_captioned(directory) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            wanted = slice(max(start - first, 0), rows if stop is None else max(stop - first, 0))
            if wanted.start < min(wanted.stop, rows):
                yield from file.read_row_group(group, columns=["image"])["image"][wanted].to_pylist()
            first += rows


def _open_captioned(directory: str | Path) -> pq.ParquetFile:
    path = Path(directory) / CAPTIONED_NAME
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"{path} is no Parquet file: {error}") from None
    if not file.schema_arrow.equals(_SCHEMA):
        raise ArtifactError(f"{path} has the columns {file.schema_arrow.names}; expected {_SCHEMA.names}")
    return file


def _encoded(source: Iterable[CaptionedImage]) -> Iterator[dict[str, object]]:
    for number, item in enumerate(source):
        if not isinstance(item, CaptionedImage):
            raise ConfigError(
                f"image {number} of the source is a {type(item).__name__}; expected CaptionedImage"
            )
        caption = check_caption(item.caption, f"image {number} of the source")
        try:
            data = encode_png(item.image)
        except ImageError as error:
            raise ImageError(f"image {number} of the source: {error}") from None
        yield {"image": data, "caption": caption}
