"""Images in an object store: the same names, bytes and errors as in a folder."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem

from accord.errors import ConfigError, ImageError
from accord.image_store import ImageBucket, ImageStoreError, open_images
from accord.images import ImageFolder, encode_png


@pytest.fixture
def png() -> bytes:
    return encode_png(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def bucket() -> Iterator[ImageBucket]:
    """In memory, behind pyarrow's interface to file systems, as S3 and GCS are."""
    memory = fsspec.filesystem("memory")
    yield ImageBucket(PyFileSystem(FSSpecHandler(memory)), "bucket/images/", "memory://bucket/images")
    memory.rm("/bucket", recursive=True)


def test_a_bucket_keeps_images(bucket: ImageBucket, png: bytes) -> None:
    digest = bucket.put(png)
    assert bucket.put(png) == digest
    assert digest in bucket
    assert bucket.get(digest) == png
    assert bucket.load(digest).shape == (8, 8, 3)
    assert fsspec.filesystem("memory").find("/bucket") == [f"/bucket/images/{digest[:2]}/{digest}.png"]


def test_what_is_not_there_or_is_damaged(bucket: ImageBucket, png: bytes) -> None:
    assert "0" * 64 not in bucket
    with pytest.raises(ImageError, match=r"there is no image 0000.* in memory://bucket/images"):
        bucket.get("0" * 64)
    with pytest.raises(ImageError, match="no image digest"):
        bucket.get("../../secret")
    with pytest.raises(ImageError, match="only PNG"):
        bucket.put(b"GIF89a")
    digest = bucket.put(png)
    fsspec.filesystem("memory").pipe(f"/bucket/images/{digest[:2]}/{digest}.png", png[:-1])
    with pytest.raises(ImageError, match="is damaged"):
        bucket.get(digest)
    assert bucket.put(png) == digest  # what is not whole is written again
    assert bucket.get(digest) == png


@pytest.mark.parametrize("options", ["?region=eu-central-1", "?foo=1"])
@pytest.mark.parametrize("secret", ["abcSECRET", "abc/SECRET"])
def test_a_secret_in_a_url_is_not_shown(secret: str, options: str) -> None:
    url = f"s3://AKIA1:{secret}@bucket/images{options}"
    try:
        shown = repr(open_images(url))
    except ConfigError as error:
        shown = str(error)
    assert "SECRET" not in shown
    assert "AKIA1:***@bucket/images" in shown


def test_a_url_without_a_bucket() -> None:
    with pytest.raises(ConfigError, match="s3:// cannot be opened: it names no bucket"):
        open_images("s3://")


def test_folders_and_urls(tmp_path: Path, png: bytes) -> None:
    folder = open_images(tmp_path / "images")
    assert isinstance(folder, ImageFolder)
    digest = folder.put(png)
    assert open_images(f"file://{tmp_path}/images").get(digest) == png
    assert open_images(str(tmp_path / "images")).get(digest) == png
    with pytest.raises(ConfigError, match=r"cannot be opened.*s3://bucket/images"):
        open_images("ftp://example.org/images")


def test_a_store_that_does_not_answer(png: bytes) -> None:
    # Nothing listens on port 1.
    where = (
        "s3://key:hunter2@bucket/images?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"
        "&connect_timeout=1"
    )
    with pytest.raises((ImageStoreError, ConfigError)) as caught:
        open_images(where).get("0" * 64)
    assert "hunter2" not in str(caught.value)
    assert "bucket/images" in str(caught.value)
