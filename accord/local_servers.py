"""Each `accord serve` says on this machine where it is, so that `accord status` finds it.

One file a server, in `serving/` of the state directory; the server holds a lock on it, which ends with the
process, however that ends.
"""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from accord.disk import temporary_file
from accord.tokens import state_directory


@dataclass(frozen=True)
class LocalServer:
    """Where a local application answers."""

    address: str
    """host:port of gRPC, without TLS."""
    tokens_path: str
    secret_path: str
    """The file with the text of the first token; it may have been moved away since."""
    metrics_address: str
    """http://host:port/metrics, for Prometheus."""
    process_id: int
    dashboard: str = ""
    """http://host:port of Ray's dashboard, where there is one."""


@contextlib.contextmanager
def announced(server: LocalServer) -> Iterator[None]:
    """Others on this machine find the server during the block. Raises OSError: its file cannot be written."""
    for left in _folder().glob("*.json"):
        with contextlib.suppress(OSError), open(left) as file:
            if not _is_locked(file.fileno()):
                left.unlink()
    # Containers that share the directory may have the same process ids.
    path = _folder() / f"{server.process_id}-{secrets.token_hex(4)}.json"
    with temporary_file(path, durable=False) as temporary:
        temporary.write_text(json.dumps(asdict(server), indent=2) + "\n", encoding="utf-8")
        handle = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)  # before it has its name: nobody sees it unlocked
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def local_servers() -> list[LocalServer]:
    """Those that run, by address; what a killed one has left is passed over."""
    found = []
    for path in _folder().glob("*.json"):
        # It may have ended just now, or be of another version.
        with contextlib.suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8") as file:
            if _is_locked(file.fileno()):
                found.append(LocalServer(**json.load(file)))
    return sorted(found, key=lambda server: server.address)


def _is_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _folder() -> Path:
    return state_directory() / "serving"
