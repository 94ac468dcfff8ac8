import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from accord.artifacts import artifact_writer
from accord.captioned import read_captioned, write_captioned
from accord.captions import CaptionedImage, image_folder, open_source, parquet
from accord.errors import ArtifactError, ConfigError, ImageError
from accord.images import Pixels, decode_image, encode_png, resize_and_crop


def plain(value: int, height: int = 4, width: int = 4) -> Pixels:
    """An image of one grey."""
    return np.full((height, width, 3), value, dtype=np.uint8)


def png(value: int) -> bytes:
    return encode_png(plain(value))


def shown(images: Iterator[CaptionedImage]) -> list[tuple[int, str]]:
    """The grey and the caption of each image."""
    return [(int(image.image[0, 0, 0]), image.caption) for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images, each with a text file; one in a subfolder, one a JPEG."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for value in range(12):
        name = "sub/a" if value == 0 else f"{value:02d}"
        path = folder / f"{name}.{'jpeg' if value == 1 else 'png'}"
        if value == 1:
            Image.fromarray(plain(value)).save(path, quality=100)
        else:
            path.write_bytes(png(value))
        path.with_suffix(".txt").write_text(f"grey {value}\n", encoding="utf-8")
    (folder / "README.md").write_text("no image")
    return folder


EVERYTHING = [(value, f"grey {value}") for value in range(12)]


def with_metadata(folder: Path, *lines: object) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return str(folder)


def test_folder_with_text_files(folder: Path) -> None:
    images = shown(image_folder(12, 0, path=str(folder)))
    assert sorted(images) == EVERYTHING
    assert images != EVERYTHING  # shuffled
    assert images == shown(image_folder(12, 0, path=str(folder)))
    assert images != shown(image_folder(12, 1, path=str(folder)))
    assert shown(image_folder(5, 0, path=str(folder))) == images[:5]


def test_folder_with_metadata(folder: Path) -> None:
    path = with_metadata(
        folder,
        {"file_name": "02.png", "text": "zwei ☆\u2028neu", "other": 1},
        "",
        {"file_name": "sub/a.png", "text": "null"},
    )
    assert sorted(shown(image_folder(2, 0, path=path))) == [(0, "null"), (2, "zwei ☆\u2028neu")]
    path = with_metadata(folder, {"file_name": "02.png", "caption": "two"})
    assert shown(image_folder(1, 0, path=path, caption_key="caption")) == [(2, "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: a list; expected an object"),
        ({"text": "two"}, "line 2: there is no 'file_name'; the keys are 'text'"),
        (
            {"file_name": "02.png", "caption": "two"},
            "line 2: there is no 'text'; the keys are 'file_name', 'cap",
        ),
        ({"file_name": "02.png", "text": ""}, "line 2: the caption is ''; expected text"),
        ({"file_name": "02.png", "text": None}, "line 2: the caption is None"),
        ({"file_name": "none.png", "text": "two"}, r"line 2: there is no file .*none\.png"),
        (
            {"file_name": "../secret.png", "text": "two"},
            r"line 2: file_name is '\.\./secret\.png'; expected a",
        ),
        (
            {"file_name": "/etc/passwd", "text": "two"},
            "line 2: file_name is '/etc/passwd'; expected a path in",
        ),
        ({"file_name": 2, "text": "two"}, "line 2: file_name is 2; expected a path inside"),
    ],
)
def test_wrong_metadata_is_told_at_once_with_its_line(folder: Path, line: object, message: str) -> None:
    path = with_metadata(folder, {"file_name": "02.png", "text": "two"}, line)
    with pytest.raises(ConfigError, match=rf"metadata\.jsonl, {message}"):
        image_folder(1, 0, path=path)


def test_folder_without_captions(folder: Path) -> None:
    (folder / "03.txt").unlink()
    (folder / "07.txt").unlink()
    with pytest.raises(
        ConfigError, match=r"2 of 12 images .* the first is .*03\.png; expected 03\.txt beside"
    ):
        image_folder(1, 0, path=str(folder))
    (folder / "03.txt").write_text(" \n")
    (folder / "07.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"03\.txt: the caption is ''"):
        image_folder(1, 0, path=str(folder))
    (folder / "03.txt").write_text("three")
    with pytest.raises(ConfigError, match=r"07\.txt is not a text file in UTF-8"):
        image_folder(1, 0, path=str(folder))


def test_wrong_requests(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"13 images are asked of .*, which has 12"):
        image_folder(13, 0, path=str(folder))
    with pytest.raises(ConfigError, match="count is 0"):
        image_folder(0, 0, path=str(folder))
    with pytest.raises(ConfigError, match="size is 0"):
        image_folder(1, 0, path=str(folder), size=0)
    with pytest.raises(ConfigError, match=r"there is no image folder .*missing"):
        image_folder(1, 0, path=str(folder / "missing"))


def test_file_that_is_no_image(folder: Path) -> None:
    (folder / "04.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"04\.png \(.*04\.txt\): the file is no image"):
        list(image_folder(12, 0, path=str(folder)))
    path = with_metadata(folder, {"file_name": "04.png", "text": "four"})
    with pytest.raises(ImageError, match=r"04\.png \(.*metadata\.jsonl, line 1\): the file is no image"):
        list(image_folder(1, 0, path=path))


def test_resize_and_crop() -> None:
    wide = np.concatenate([plain(0, 4, 4), plain(100, 4, 4), plain(200, 4, 4)], axis=1)
    np.testing.assert_array_equal(resize_and_crop(wide, 4), plain(100))  # the middle, untouched
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(resize_and_crop(tall, 4), plain(100))
    assert resize_and_crop(plain(7, 9, 5), 3).tolist() == plain(7, 3, 3).tolist()
    assert resize_and_crop(plain(7, 3, 1000), 2).shape == (2, 2, 3)
    assert resize_and_crop(plain(7, 60, 49), 1).tolist() == plain(7, 1, 1).tolist()  # 49 * (1 / 49) < 1
    np.testing.assert_array_equal(resize_and_crop(plain(7, 2, 2), 5), plain(7, 5, 5))


def test_size_option(folder: Path) -> None:
    path = with_metadata(folder, {"file_name": "wide.png", "text": "wide"})
    (folder / "wide.png").write_bytes(encode_png(plain(9, 10, 30)))
    assert next(image_folder(1, 0, path=path)).image.shape == (10, 30, 3)
    assert next(image_folder(1, 0, path=path, size=8)).image.shape == (8, 8, 3)


def write_parquet(path: Path, rows: list[dict[str, object]], rows_per_group: int = 4) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    """Twelve rows in two files, in row groups of four and three."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows: list[dict[str, object]] = [{"image": png(value), "caption": text} for value, text in EVERYTHING]
    write_parquet(folder / "a.parquet", rows[:5])
    write_parquet(folder / "b.parquet", rows[5:], rows_per_group=3)
    return folder


def test_parquet(parquet_folder: Path) -> None:
    path = str(parquet_folder)
    images = shown(parquet(12, 0, path=path))
    assert sorted(images) == EVERYTHING
    assert images != EVERYTHING
    assert images == shown(parquet(12, 0, path=path))
    assert images != shown(parquet(12, 1, path=path))
    assert shown(parquet(5, 3, path=str(parquet_folder / "a.parquet"), size=2))
    assert next(parquet(1, 0, path=path, size=2)).image.shape == (2, 2, 3)


def test_parquet_chooses_from_all_row_groups_alike(parquet_folder: Path) -> None:
    chosen = [shown(parquet(4, seed, path=str(parquet_folder))) for seed in range(300)]
    assert all(len(set(images)) == 4 for images in chosen)
    counts = np.bincount([value for images in chosen for value, _ in images], minlength=12)
    # Each of the 12 rows is expected 100 times, with a standard deviation of about 8.
    assert counts.min() > 65
    assert counts.max() < 135


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "hub.parquet"
    write_parquet(path, [{"image": {"bytes": png(3), "path": None}, "text": "three"}])
    assert shown(parquet(1, 0, path=str(path))) == [(3, "three")]
    write_parquet(path, [{"picture": png(3), "text": "no", "caption": "no", "alt": "three"}])
    assert shown(parquet(1, 0, path=str(path), image_column="picture", caption_column="alt")) == [
        (3, "three")
    ]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"image": b"no image", "caption": "x"}, ImageError, r"p\.parquet, row 5: the file is no image"),
        (
            {"image": None, "caption": "x"},
            ImageError,
            r"p\.parquet, row 5: there are no image bytes in 'image'",
        ),
        ({"image": png(1), "caption": None}, ConfigError, r"p\.parquet, row 5: the caption is None"),
        ({"image": png(1), "caption": ""}, ConfigError, r"p\.parquet, row 5: the caption is ''"),
    ],
)
def test_wrong_row_is_told_with_its_number(
    tmp_path: Path, row: dict[str, object], error: type[Exception], message: str
) -> None:
    good: dict[str, object] = {"image": png(1), "caption": "x"}
    write_parquet(tmp_path / "p.parquet", [*[good] * 5, row, good])
    with pytest.raises(error, match=message):
        list(parquet(7, 0, path=str(tmp_path)))


def test_wrong_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with pytest.raises(ConfigError, match=r"is no Parquet file, and no folder that has one"):
        parquet(1, 0, path=str(path))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"p\.parquet is no Parquet file"):
        parquet(1, 0, path=str(path))
    write_parquet(path, [{"image": png(1), "title": "x"}])
    with pytest.raises(
        ConfigError, match=r"has the columns image, title; .* captions in 'caption' or 'text'"
    ):
        parquet(1, 0, path=str(path))
    with pytest.raises(ConfigError, match="expected images in 'picture'"):
        parquet(1, 0, path=str(path), image_column="picture", caption_column="title")
    with pytest.raises(ConfigError, match=r"the column 'title' is of the type string; expected the bytes"):
        parquet(1, 0, path=str(path), image_column="title", caption_column="title")
    with pytest.raises(ConfigError, match=r"2 images are asked of .*, which has 1"):
        parquet(2, 0, path=str(path), caption_column="title")


def greys(count: int) -> Iterator[CaptionedImage]:
    return (CaptionedImage(plain(value % 256), f"grey {value}") for value in range(count))


def test_written_images_come_back(tmp_path: Path) -> None:
    directory = tmp_path / "seed=1" / "images"  # Parquet readers may take such a folder for a column
    config = {"source": "accord.captions:parquet", "count": 600}
    manifest = write_captioned(greys(600), directory, inputs={"x": "d" * 64}, config=config, seed=5)
    assert (manifest.kind, manifest.seed, manifest.config) == ("captioned_images", 5, config)
    images, captions = read_captioned(directory)
    assert captions == [f"grey {value}" for value in range(600)]
    assert [int(decode_image(data)[0, 0, 0]) for data in images] == [value % 256 for value in range(600)]
    again = write_captioned(greys(600), tmp_path / "again", inputs={}, config={}, seed=6)
    assert again.digest == manifest.digest
    assert (
        write_captioned(greys(599), tmp_path / "again", inputs={}, config={}, seed=5).digest != again.digest
    )
    # What was written is a source itself.
    assert sorted(shown(parquet(600, 0, path=str(directory))))[0] == (0, "grey 0")


def broken() -> Iterator[CaptionedImage]:
    yield from greys(300)
    raise ImageError("image 300 is broken")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: iter(()), ConfigError, "gave none"),
        (broken, ImageError, "image 300 is broken"),
        (
            lambda: iter([plain(1)]),
            ConfigError,
            "image 0 of the source is a ndarray; expected CaptionedImage",
        ),
        (
            lambda: iter([CaptionedImage(plain(1), " ")]),
            ConfigError,
            "image 0 of the source: the caption is ' '",
        ),
        (
            lambda: iter([CaptionedImage(plain(1)[..., 0], "flat")]),
            ImageError,
            r"image 0 of the source: cannot encode an array of shape \(4, 4\)",
        ),
    ],
)
def test_nothing_is_written_of_a_wrong_source(
    tmp_path: Path, source: Callable[[], Iterator[CaptionedImage]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_captioned(source(), tmp_path / "images", inputs={}, config={}, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_other_artifacts_are_refused(tmp_path: Path) -> None:
    write_captioned(greys(3), tmp_path / "images", inputs={}, config={}, seed=0)
    path = tmp_path / "images" / "captioned.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"captioned\.parquet was changed or damaged"):
        read_captioned(tmp_path / "images")
    with artifact_writer(tmp_path / "images", "captioned_images", inputs={}, config={}, seed=0) as temporary:
        pq.write_table(pa.table({"image": [b"x"]}), temporary / "captioned.parquet")
    with pytest.raises(ArtifactError, match=r"has the columns \['image'\]; expected \['image', 'caption'\]"):
        read_captioned(tmp_path / "images")
    with artifact_writer(tmp_path / "images", "captioned_images", inputs={}, config={}, seed=0) as temporary:
        (temporary / "captioned.parquet").write_bytes(io.BytesIO(b"PAR1").getvalue())
    with pytest.raises(ArtifactError, match="is no Parquet file"):
        read_captioned(tmp_path / "images")


def test_open_source(folder: Path) -> None:
    options = {"path": str(folder), "size": 2}
    images = list(open_source("accord.captions:image_folder", 3, 0, options))
    assert [image.image.shape for image in images] == [(2, 2, 3)] * 3
    with pytest.raises(ConfigError, match="options path, sise: got an unexpected keyword argument 'sise'"):
        open_source("accord.captions:image_folder", 3, 0, {"path": str(folder), "sise": 2})
    with pytest.raises(ConfigError, match=r"options \(none\): missing a required .*'path'"):
        open_source("accord.captions:image_folder", 3, 0)
    with pytest.raises(ConfigError, match="has no 'folder_of_images'"):
        open_source("accord.captions:folder_of_images", 3, 0)
