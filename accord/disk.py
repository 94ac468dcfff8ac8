"""Files that are written whole or not at all, and full disks that are told as what they are."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accord.errors import StorageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Libraries written in other languages lose the errno and keep the text.
_FULL_TEXTS = ("no space left", "file too large", "disk quota exceeded", "database or disk is full")


@contextlib.contextmanager
def storage_errors(where: str | Path) -> Iterator[None]:
    """Turns a full disk, a quota or a file-size limit, in whatever library it shows, into a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        raise StorageError(
            f"no room to write {where}: the disk is full, or a quota or file-size limit is reached. "
            f"Nothing was changed; make room and start again ({error})"
        ) from error


def write_file(path: str | Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file, all or nothing: a reader sees the old content or the new, never a part.

    `durable` waits until the disk has it, so that it outlives a power cut.

    Raises:
        StorageError: when the disk is full.
    """
    path = Path(path)
    with storage_errors(path), temporary_file(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def temporary_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A file beside `path` that becomes it when the block ends well; else nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        open_to_readers(temporary, 0o666)
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_to_readers(path: Path, mode: int) -> None:
    """Give what tempfile made private the mode that an ordinary file or directory would have."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def sync(path: Path) -> None:
    """Waits until the disk has the file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen).lower() for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
