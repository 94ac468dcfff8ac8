import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from accord.captions import open_source
from accord.errors import AccordError, ConfigError, ImageError
from accord.webdataset import shards
from tests.test_captions import EVERYTHING, plain, png, shown


def write_shard(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve samples in two shards; captions as text, and as JSON."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first: dict[str, bytes | str] = {}
    second: dict[str, bytes | str] = {}
    for value, caption in EVERYTHING[:5]:
        first |= {f"{value:04d}.png": png(value), f"{value:04d}.txt": f"{caption}\n", f"{value:04d}.cls": "7"}
    for value, caption in EVERYTHING[5:]:
        key = f"./part.1/{value}"  # the key ends at the first dot of the file's name, not of its folder's
        second |= {f"{key}.json": json.dumps({"text": caption, "alt": "alt"}), f"{key}.PNG": png(value)}
    write_shard(folder / "00000.tar", first)
    write_shard(folder / "00001.tar", second)
    return folder


def test_samples_are_shuffled_by_seed(folder: Path) -> None:
    path = str(folder)
    images = shown(shards(12, 0, path=path))
    assert sorted(images) == EVERYTHING
    assert images != EVERYTHING
    assert images == shown(open_source("accord.webdataset:shards", 12, 0, {"path": path}))
    assert images != shown(shards(12, 1, path=path))
    assert len(set(shown(shards(5, 3, path=path)))) == 5
    one = next(shards(1, 0, path=str(folder / "00001.tar"), size=2, caption_key="alt"))
    assert (one.image.shape, one.caption) == ((2, 2, 3), "alt")


def test_samples_are_chosen_from_all_shards_alike(folder: Path) -> None:
    chosen = [shown(shards(4, seed, path=str(folder))) for seed in range(150)]
    counts = np.bincount([value for images in chosen for value, _ in images], minlength=12)
    # Each is expected 50 times, with a standard deviation of about 6.
    assert 25 < counts.min() <= counts.max() < 80


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a.txt": "x"}, ConfigError, r"s\.tar, key 'a': 0 images among txt; expected one of jpeg, jpg"),
        ({"a.png": png(1), "a.jpg": png(1), "a.txt": "x"}, ConfigError, "key 'a': 2 images among png, jpg"),
        ({"a.png": png(1)}, ConfigError, "key 'a': there is no caption among png; expected txt or json"),
        ({"a.png": b"no image", "a.txt": "x"}, ImageError, r"s\.tar, key 'a': the file is no image"),
        ({"a.png": png(1), "a.txt": " "}, ConfigError, r"s\.tar, key 'a': the caption is ''"),
        ({"a.png": png(1), "a.txt": b"\xff"}, ConfigError, r"key 'a': a\.txt is no text in UTF-8"),
        ({"a.png": png(1), "a.json": "{"}, ConfigError, r"key 'a': a\.json is not JSON"),
        ({"a.png": png(1), "a.json": "[]"}, ConfigError, r"key 'a': a\.json has no 'caption' or 'text'"),
        ({"a.png": png(1), "a.json": '{"text": null}'}, ConfigError, "key 'a': the caption is None"),
    ],
)
def test_a_wrong_sample_is_told_by_shard_and_key(
    tmp_path: Path, files: dict[str, bytes | str], error: type[AccordError], message: str
) -> None:
    path = write_shard(tmp_path / "s.tar", files)
    with pytest.raises(error, match=message):
        list(shards(1, 0, path=str(path)))


def test_wrong_shards_are_told_at_once(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"13 images are asked of .*, which has 12"):
        shards(13, 0, path=str(folder))
    with pytest.raises(ConfigError, match="no folder that has one"):
        shards(1, 0, path=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="no caption among png, txt, cls; expected json"):
        shards(1, 0, path=str(folder), caption_key="alt")
    whole = (folder / "00000.tar").read_bytes()
    for length in (1400, 3072):  # within a header; behind a whole sample
        (folder / "00000.tar").write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"00000\.tar is no whole tar file: its end is missing"):
            shards(1, 0, path=str(folder))
    (folder / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(ConfigError, match=r"00000\.tar is no whole tar file: "):
        shards(1, 0, path=str(folder))
    twice = write_shard(tmp_path / "t.tar", {"a.png": png(1), "a.PNG": png(2), "a.txt": "x"})
    with pytest.raises(ConfigError, match=r"key 'a': a\.PNG is there twice"):
        shards(1, 0, path=str(twice))


def test_links_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "s.tar", {"a.png": png(3), "a.txt": "three", "._a.png": b"x", "README": "x"}
    )
    with tarfile.open(path, "a") as shard:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        shard.addfile(link)
    assert shown(shards(1, 0, path=str(path))) == [(3, "three")]
    assert plain(3).shape == next(shards(1, 0, path=str(path))).image.shape
