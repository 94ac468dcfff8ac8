"""Where images are kept by digest: in a folder, or in an object store."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from accord.artifacts import sha256_bytes, storage_errors
from accord.config import redact_url
from accord.errors import AccordError, ConfigError, ImageError
from accord.images import PNG_SIGNATURE, ImageFolder, Pixels, check_digest, decode_image

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# An AWS secret may hold a slash: whatever stands before the last @ is not shown.
_SECRET = re.compile(r"(?<=://)([^@:]*):.*@", re.DOTALL)
_EXAMPLES = "a folder, s3://bucket/images, gs://bucket/images or file:///folder"


class ImageStoreError(AccordError):
    """The object store does not answer, or refuses. The same may work later."""


class ImageStore(Protocol):
    """PNG files by the SHA-256 of their bytes. Safe for many readers and writers at once."""

    def __contains__(self, digest: object) -> bool: ...

    def put(self, data: bytes) -> str:
        """Keep a PNG and return its digest. Keeping it again changes nothing."""
        ...

    def get(self, digest: str) -> bytes:
        """The bytes of an image, checked against its digest.

        Raises:
            ImageError: when it is missing or damaged.
        """
        ...

    def load(self, digest: str) -> Pixels:
        """The uint8 RGB pixels (HWC) of an image."""
        ...


def open_images(where: str | Path) -> ImageStore:
    """The images at a folder or URL. In an object store they lie as in a folder: `ab/abcd....png`.

    Whatever `pyarrow.fs` knows can be used, with its options in the URL, such as
    s3://bucket/images?region=eu-central-1 or ?endpoint_override=HOST:PORT&scheme=http. Credentials are those
    of the machine (environment, files, instance roles).

    Raises:
        ConfigError: the URL cannot be used. What in it may be secret is not shown.
    """
    if isinstance(where, Path) or "://" not in where:
        return ImageFolder(where)
    from pyarrow.fs import FileSystem, LocalFileSystem

    shown, problem = redact_url(_SECRET.sub(r"\1:***@", where)), ""
    try:
        files, root = FileSystem.from_uri(where)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors too
        problem = " ".join(str(error).replace(where, shown).split())
    if not problem and not root.strip("/"):
        problem = "it names no bucket"
    if problem:
        raise ConfigError(f"the images at {shown} cannot be opened: {problem}; expected {_EXAMPLES}")
    if isinstance(files, LocalFileSystem):
        return ImageFolder(root)
    return ImageBucket(files, root, shown)


class ImageBucket:
    """PNG files in an object store, named as in an `ImageFolder`. An object is there whole or not at all."""

    def __init__(self, files: "FileSystem", root: str, shown: str) -> None:
        """`root` is the bucket and the folder in it; `shown` names the store in errors."""
        self._files = files
        self._root = root.rstrip("/")
        self._shown = shown

    def __repr__(self) -> str:
        return f"ImageBucket({self._shown!r})"

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self._size(digest) is not None

    def put(self, data: bytes) -> str:
        """Store a PNG and return its digest. Storing it again changes nothing.

        Raises:
            ImageError: when `data` is no PNG.
            ImageStoreError: when the store refuses or does not answer.
        """
        if not data.startswith(PNG_SIGNATURE):
            raise ImageError("only PNG files are kept here; encode the pixels with encode_png")
        digest = sha256_bytes(data)
        with self._errors():
            if self._size(digest) != len(data):
                with self._files.open_output_stream(self._name(digest)) as stream:
                    stream.write(data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of an image, checked against its digest.

        Raises:
            ImageError: when it is missing or damaged.
            ImageStoreError: when the store refuses or does not answer.
        """
        name = self._name(digest)
        with self._errors():
            try:
                with self._files.open_input_stream(name) as stream:
                    data = bytes(stream.read())
            except FileNotFoundError:
                raise ImageError(f"there is no image {digest} in {self._shown}") from None
        if sha256_bytes(data) != digest:
            raise ImageError(f"the image {digest} in {self._shown} is damaged: remove it there")
        return data

    def load(self, digest: str) -> Pixels:
        """The uint8 RGB pixels (HWC) of an image.

        Raises:
            ImageError: when it is missing or damaged.
        """
        return decode_image(self.get(digest))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with storage_errors(self._shown):
            try:
                yield
            except OSError as error:
                text = " ".join(str(error).split())
                raise ImageStoreError(
                    f"the images at {self._shown} cannot be read or written: {text}"
                ) from None

    def _name(self, digest: str) -> str:
        check_digest(digest)
        return f"{self._root}/{digest[:2]}/{digest}.png"

    def _size(self, digest: str) -> int | None:
        from pyarrow.fs import FileType

        with self._errors():
            found = self._files.get_file_info(self._name(digest))
        return int(found.size) if found.type == FileType.File else None
