"""A source of captioned images (see captions.py): webdataset's shards, tar files of samples.

A sample is all files of one key, which is a name up to its first dot: KEY.jpg (or .jpeg, .png, .webp) and the
caption in KEY.txt, or else in KEY.json.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from accord.captions import (
    CaptionedImage,
    check_caption,
    check_count,
    check_request,
    chosen_of,
    decode_to,
    files_of,
)
from accord.config import resolve_path
from accord.errors import ConfigError, ImageError

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_TEXT, _JSON = "txt", "json"
_CAPTION_KEYS = ("caption", "text")


@dataclass(frozen=True)
class _Sample:
    """A key with its files in the shard; `text` is that of its caption."""

    key: str
    image: tarfile.TarInfo
    text: tarfile.TarInfo


def shards(
    count: int, seed: int, *, path: str, size: int | None = None, caption_key: str | None = None
) -> Iterator[CaptionedImage]:
    """`count` samples of a shard, or of all *.tar in a folder, chosen and shuffled by `seed`.

    One image is in memory at a time, and the names of one shard: samples are chosen from all shards alike,
    shards come in a shuffled order, and samples are shuffled within their shard.

    Args:
        count: how many samples, without repetition.
        seed: of the choice and the order.
        path: a file or a folder. Not compressed: images are so already, and are read where they lie.
        size: side in pixels; the shorter side is resized to it, and the middle is cut out. None: as they are.
        caption_key: the key of the caption in KEY.json; None: "caption", or else "text". A KEY.txt is not
            looked at when it is given.

    Raises:
        ConfigError: at once, when the path or `count` is wrong, a shard is damaged, or a sample lacks its
            image or caption; on the way, when a caption is empty.
        ImageError: on the way, naming the shard and the key that is no image.
    """
    root = resolve_path(path)
    check_request(count, size)
    files = files_of(root, ".tar", "tar file")
    counts = [len(_samples(file, caption_key)) for file in files]
    check_count(count, sum(counts), str(root))
    return _chosen(files, counts, count, seed, size, caption_key)


def _chosen(
    files: list[Path], counts: list[int], count: int, seed: int, size: int | None, caption_key: str | None
) -> Iterator[CaptionedImage]:
    for number, places in chosen_of(counts, count, seed):
        samples = _samples(files[number], caption_key)
        with tarfile.open(files[number], "r:") as shard:
            for sample in (samples[place] for place in places):
                where = f"{files[number]}, key {sample.key!r}"
                caption = _caption(_content(shard, sample.text, where), sample.text.name, where, caption_key)
                yield CaptionedImage(decode_to(_content(shard, sample.image, where), where, size), caption)


def _samples(file: Path, caption_key: str | None) -> list[_Sample]:
    """Every sample of a shard, in its order, of whose files only the names are read."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    last = ""
    try:
        _check_end(file)
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                last = member.name
                folder, _, name = last.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if found.setdefault(key, {}).setdefault(suffix.lower(), member) is not member:
                    raise ConfigError(f"{file}, key {key!r}: {last} is there twice")
    except (tarfile.TarError, OSError, EOFError) as error:
        after = f", behind {last}" if last else ""
        raise ConfigError(
            f"{file} is no whole tar file{after}: {error}. Expected a shard that is not compressed; copy or "
            "make it anew"
        ) from None
    return [_sample(file, key, members, caption_key) for key, members in found.items()]


def _check_end(file: Path) -> None:
    """A tar file ends with blocks of zeros; tarfile takes one that was cut between members for whole."""
    with open(file, "rb") as opened:
        length = opened.seek(0, os.SEEK_END)
        opened.seek(max(length - tarfile.BLOCKSIZE, 0))
        if length % tarfile.BLOCKSIZE or opened.read() != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _sample(file: Path, key: str, members: Mapping[str, tarfile.TarInfo], caption_key: str | None) -> _Sample:
    images = [suffix for suffix in members if suffix in _IMAGES]
    if len(images) != 1:
        raise ConfigError(
            f"{file}, key {key!r}: {len(images)} images among {', '.join(members)}; expected one of "
            f"{', '.join(sorted(_IMAGES))}"
        )
    wanted = (_JSON,) if caption_key else (_TEXT, _JSON)
    text = next((members[suffix] for suffix in wanted if suffix in members), None)
    if text is None:
        raise ConfigError(
            f"{file}, key {key!r}: there is no caption among {', '.join(members)}; expected "
            f"{' or '.join(wanted)}"
        )
    return _Sample(key, members[images[0]], text)


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    try:
        opened = shard.extractfile(member)
        content = b"" if opened is None else opened.read()
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{where}: cannot read {member.name}: {error}") from None
    return content


def _caption(content: bytes, name: str, where: str, caption_key: str | None) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {name} is no text in UTF-8: {error}") from None
    if not name.lower().endswith(f".{_JSON}"):
        return check_caption(text.strip(), where)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} is not JSON: {error}") from None
    wanted = (caption_key,) if caption_key else _CAPTION_KEYS
    present = [key for key in wanted if isinstance(data, dict) and key in data]
    if not present:
        raise ConfigError(f"{where}: {name} has no {' or '.join(map(repr, wanted))}; see option caption_key")
    return check_caption(data[present[0]], where)
