"""Images of public files, as they come: bytes, paths, or digests; kept as PNG, if wanted at one size."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accord.artifacts import sha256_bytes
from accord.errors import FeedbackError
from accord.images import ImageFolder, decode_image, encode_png, resize_and_crop

_HEXADECIMAL = frozenset("0123456789abcdef")


@dataclasses.dataclass(frozen=True)
class KeptImage:
    """An image in the folder; its sides are in pixels."""

    digest: str
    width: int
    height: int


class ImageSource:
    """Takes images into a folder. The same bytes or path are taken once.

    Args:
        folder: where images are kept.
        root: the folder that paths are relative to, and that none may leave.
        size_px: side of the square that images are cropped (about their middle) and scaled to; None leaves
            them as they are.
    """

    def __init__(self, folder: ImageFolder, root: Path, size_px: int | None = None) -> None:
        self._folder, self._root, self._size_px = folder, root.resolve(), size_px
        self._known: dict[str, KeptImage] = {}

    def take(self, value: Any) -> KeptImage:
        """The image that a value of a column means.

        Raises:
            FeedbackError: it means none, or a file that is not there.
            ImageError: it is no image, or damaged.
        """
        if isinstance(value, Mapping):  # as Hugging Face's datasets keep images
            data, path = value.get("bytes"), value.get("path")
            value = data if data is not None else path
        if isinstance(value, bytes):
            return self._keep(value, f"bytes {sha256_bytes(value)}")
        if not isinstance(value, str) or not value.strip():
            raise FeedbackError(f"the image is {type(value).__name__}; expected bytes, a path or a digest")
        if value in self._known:
            return self._known[value]
        if len(value) == 64 and _HEXADECIMAL.issuperset(value) and value in self._folder:
            height, width = self._folder.load(value).shape[:2]
            return self._known.setdefault(value, KeptImage(value, width, height))
        return self._keep(self._read(value), value)

    def _read(self, name: str) -> bytes:
        if "://" in name:
            raise FeedbackError(
                f"the image is at {name}: download it first, and state the column of its path"
            )
        try:
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root):
                raise FeedbackError(f"the image {name!r} lies outside {self._root}")
            return path.read_bytes()
        except (OSError, ValueError):
            raise FeedbackError(f"there is no image {name!r} in {self._root}") from None

    def _keep(self, data: bytes, name: str) -> KeptImage:
        if name not in self._known:
            pixels_HWC = decode_image(data)
            if self._size_px is not None:
                pixels_HWC = resize_and_crop(pixels_HWC, self._size_px)
            height, width = pixels_HWC.shape[:2]
            self._known[name] = KeptImage(self._folder.put(encode_png(pixels_HWC)), width, height)
        return self._known[name]
