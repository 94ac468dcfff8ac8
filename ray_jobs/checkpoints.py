"""A training's checkpoints on the disk: written behind its back, whole or not at all, and found again.

Each is a directory step-NNNNNNNN that appears by one rename when it is complete, in storage that all workers
reach. So the newest one that is there is the place to go on from, whoever was killed when.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from accord.artifacts import MANIFEST_NAME
from accord.errors import ArtifactError

logger = logging.getLogger(__name__)

KEPT = 2
RAYS_LIST = "checkpoint_manager_snapshot.json"
Write = Callable[[Path], Any]


class Learner(Protocol):
    """What can be trained. `step` returns scalar tensors that stay on the device.

    A learner may also have `snapshot(copy) -> an object with write(directory), or None`, called on all
    workers: what is written then is the state at the call (with `copy`, even if training goes on), and None
    means that another worker writes it.
    """

    step_index: int

    def step(self) -> dict[str, Any]: ...

    def save(self, directory: Path) -> Any: ...

    def load(self, directory: Path) -> None: ...


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def newest_first(directory: Path) -> list[Path]:
    """The whole checkpoints of a training."""
    whole = (path for path in directory.glob("step-*") if (path / MANIFEST_NAME).exists())
    return sorted(whole, reverse=True)


def restore(learner: Learner, checkpoints: Sequence[Path]) -> None:
    """Loads the first that is undamaged; with none given, the learner stays as it is.

    Raises ArtifactError when all are damaged, ConfigError when they are another run's.
    """
    for place, path in enumerate(checkpoints):
        try:
            learner.load(path)
        except ArtifactError as error:
            if place == len(checkpoints) - 1:
                raise
            logger.warning("%s; going on from the checkpoint before it", error)
        else:
            return


def prune(directory: Path) -> None:
    """Removes all but the newest ones."""
    for old in newest_first(directory)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def heal(directory: Path) -> None:
    """Forgets Ray Train's list of checkpoints when it was killed while it wrote that (it does not write by
    rename). The checkpoints themselves stay.
    """
    snapshot = directory / RAYS_LIST
    if not snapshot.exists():
        return
    try:
        json.loads(snapshot.read_text())
    except ValueError:
        snapshot.unlink()


def writer_of(learner: Learner, rank: int, *, copy: bool) -> Write | None:
    """What writes the learner's state as it is now; None where another worker writes it. All workers must
    ask."""
    if hasattr(learner, "snapshot"):
        snapshot = learner.snapshot(copy=copy)
        return None if snapshot is None else snapshot.write
    return learner.save if rank == 0 else None


def can_wait(learner: Learner, device: Any, wanted: bool | None) -> bool:
    """Whether checkpoints are written while training goes on: by default where it runs on a GPU, since the
    copy takes as much of the host's memory as the state has."""
    return hasattr(learner, "snapshot") and (device.type != "cpu" if wanted is None else wanted)


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread. Leaving the context waits for the last one.

    A failure is raised at the next `write`, or on leaving; what was written before stays.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, job: Callable[[], Any]) -> None:
        """Begins `job` when the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")  # no daemon: it is waited for
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
